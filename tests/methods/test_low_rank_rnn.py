"""Low-rank recurrent weights of equal norm, and how lazily networks learn from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods._layers import normal, rank_of
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption, InvalidRank, UnsupportedLayer
from rankfold.methods.laziness import (
    kernel_alignment,
    representation_alignment,
    sign_similarity,
    tangent_kernel,
    weight_change,
)
from rankfold.methods.scratch.low_rank_rnn import with_rank

SIZE, UNITS = 24, 64


def started(rank: int, **options: Any) -> Tensor:
    return rf.low_rank_recurrent_(torch.zeros(SIZE, SIZE, dtype=torch.float64), rank, **options)


@pytest.mark.parametrize("rank", [1, 3, 24])
def test_every_rank_has_the_norm_of_the_full_one_and_its_leading_directions(rank: int) -> None:
    full, low = started(SIZE), started(rank)
    assert rank_of(low) == rank
    torch.testing.assert_close(low.norm(), full.norm())
    left, values, right = torch.linalg.svd(full)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    torch.testing.assert_close(low, best * full.norm() / best.norm())


def test_the_full_start_is_normal_with_the_gain_over_the_root_of_the_width() -> None:
    drawn = rf.low_rank_recurrent_(torch.zeros(200, 200), 200, gain=1.5)
    assert float(drawn.std()) == pytest.approx(1.5 / 200**0.5, rel=0.02)
    assert torch.equal(started(2), started(2))
    assert not torch.allclose(started(2), started(2, seed=1))


CELLS = {
    "rnn": (lambda: nn.RNN(5, SIZE, num_layers=2, bidirectional=True), 4),
    "gru": (lambda: nn.GRU(5, SIZE), 3),
    "lstm": (lambda: nn.LSTM(5, SIZE, proj_size=6), 4),
    "rnn cell": (lambda: nn.RNNCell(5, SIZE), 1),
    "gru cell": (lambda: nn.Sequential(nn.GRUCell(5, SIZE)), 3),
}


@pytest.mark.parametrize("kind", CELLS)
def test_every_gate_of_every_recurrent_layer_is_started_and_nothing_else(kind: str) -> None:
    make, count = CELLS[kind]
    model = make()
    before = copy.deepcopy(model)
    assert rf.low_rank_recurrent_(model, 2) is model
    gates = []
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        if "weight_hh" in name:
            own = now.detach().split(SIZE)
            gates += own
            assert rank_of(now.detach()) == min(2 * len(own), now.shape[1])  # each has its own
        else:
            assert torch.equal(now, then)
    assert len(gates) == count
    assert [rank_of(gate) for gate in gates] == [2] * count
    assert len({float(gate[0, 0]) for gate in gates}) == count


def test_without_a_gain_the_weights_that_are_there_are_cut() -> None:
    model = nn.RNN(3, SIZE).double()
    wanted = with_rank(model.weight_hh_l0.detach().clone(), 4)
    torch.testing.assert_close(rf.low_rank_recurrent_(model, 4, gain=None).weight_hh_l0.detach(), wanted)


def test_bad_input_is_refused_and_changes_nothing() -> None:
    model = nn.LSTM(5, SIZE, proj_size=6)
    before = model.weight_hh_l0.detach().clone()
    with pytest.raises(InvalidRank, match=r"weight_hh_l0\[0\]: rank 7 is not in 1..min\(out, in\) = 6"):
        rf.low_rank_recurrent_(model, 7)
    with pytest.raises(InvalidOption, match="low-rank-rnn: gain must be positive, not 0"):
        rf.low_rank_recurrent_(model, 2, gain=0)
    with pytest.raises(UnsupportedLayer, match="Linear has no recurrent weight"):
        rf.low_rank_recurrent_(nn.Linear(3, 3), 2)
    assert torch.equal(model.weight_hh_l0, before)
    for rank in (0, 2.0, True):
        with pytest.raises(InvalidRank, match=f"rank {rank} is not in"):
            rf.low_rank_recurrent_(model, rank)  # type: ignore[arg-type]
    for shape, dtype in (((4,), torch.float32), ((3, 4, 4), torch.float32), ((4, 4), torch.long)):
        with pytest.raises(InvalidOption, match="low-rank-rnn starts real matrices, not"):
            rf.low_rank_recurrent_(torch.zeros(shape, dtype=dtype), 2)


def test_a_weight_of_zeros_that_is_cut_stays_zero() -> None:
    assert not rf.low_rank_recurrent_(torch.zeros(4, 4), 2, gain=None).any()


# Measures ---------------------------------------------------------------------------------------------


def test_representation_alignment_is_that_of_the_similarities_of_samples() -> None:
    now, then = normal(6, 4), normal(6, 9, seed=2)
    r, r0 = now @ now.T, then @ then.T
    wanted = torch.trace(r @ r0) / (r.norm() * r0.norm())
    assert representation_alignment(now, then) == pytest.approx(float(wanted))
    turned = then @ torch.linalg.qr(normal(9, 9)).Q
    assert representation_alignment(turned, then) == pytest.approx(1)


def test_the_tangent_kernel_is_that_of_all_output_gradients() -> None:
    weight, inputs = normal(3, 4).requires_grad_(), normal(5, 4, seed=2)
    kernel = tangent_kernel(inputs @ weight.T, [weight])
    jacobian = torch.autograd.functional.jacobian(lambda w: inputs @ w.T, weight).flatten(2).flatten(0, 1)
    torch.testing.assert_close(kernel, jacobian @ jacobian.T)
    assert kernel_alignment(kernel, 3 * kernel) == pytest.approx(1)
    assert kernel_alignment(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == 0


def test_signs_and_changes_are_counted() -> None:
    assert sign_similarity(torch.tensor([1.0, -2, 0, 3]), torch.tensor([2.0, 2, 0, 0])) == 0.5
    change = weight_change(
        {"a": torch.ones(4), "b": torch.zeros(2)}, {"a": torch.zeros(4), "b": torch.zeros(2)}
    )
    assert change == 2.0


# The claim --------------------------------------------------------------------------------------------


class RateNetwork(nn.Module):
    """h_t = relu((1 - a) h_{t-1} + a (W h_{t-1} + V x_t)), and a linear output of the last state."""

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.recurrent = nn.Parameter(rf.low_rank_recurrent_(torch.zeros(UNITS, UNITS), rank, seed=seed))
        self.inputs = nn.Parameter(torch.randn(UNITS, 2, generator=generator) / 2**0.5)
        self.output = nn.Parameter(torch.randn(2, UNITS, generator=generator) / UNITS**0.5)

    def hidden(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), UNITS)
        for now in x.unbind(1):
            state = torch.relu(0.5 * state + 0.5 * (state @ self.recurrent.T + now @ self.inputs.T))
        return state

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) @ self.output.T


def alternatives(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy evidence for one of two alternatives, and which."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(2, (count,), generator=generator)
    evidence = F.one_hot(wanted, 2).float()[:, None] + 0.5
    return evidence + torch.randn(count, 12, 2, generator=generator), wanted


def learned(rank: int, seed: int, loss_wanted: float = 0.1) -> rf.Laziness:
    """Train to a loss, and measure against the start."""
    model, (x, wanted) = RateNetwork(rank, seed), alternatives(48, seed)
    start, probes = copy.deepcopy(model), alternatives(8, seed + 100)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    for _ in range(400):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), wanted)
        if loss.item() < loss_wanted:
            break
        loss.backward()
        optimizer.step()
    assert 0.7 * loss_wanted < loss.item() < loss_wanted  # they are compared at equal loss
    return rf.laziness(
        model, start, hidden=lambda m: m.hidden(probes), output=lambda m: m(probes), weights=["recurrent"]
    )


def test_at_the_start_all_measures_say_that_nothing_has_changed() -> None:
    model, probes = RateNetwork(2, 0), alternatives(6, 1)[0]
    found = rf.laziness(
        model,
        copy.deepcopy(model),
        hidden=lambda m: m.hidden(probes),
        output=lambda m: m(probes),
        weights=["recurrent"],
    )
    assert found.weight_change == 0
    assert found.sign_similarity == 1
    assert found.representation_alignment == pytest.approx(1)
    assert found.kernel_alignment == pytest.approx(1)
    with pytest.raises(InvalidOption, match="weights must name parameters"):
        rf.laziness(model, model, hidden=lambda m: probes, output=lambda m: m(probes), weights=["other"])


def test_from_a_higher_rank_learning_changes_less() -> None:
    low, high = ([learned(rank, seed) for seed in range(4)] for rank in (1, UNITS))
    assert sum(x.weight_change for x in low) > sum(x.weight_change for x in high)
    assert sum(x.kernel_alignment for x in low) < sum(x.kernel_alignment for x in high)
