"""Flora's momentum and accumulated gradients are random projections that are right in the mean."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, InvalidRank
from rankfold.optim import CompressedAccumulation
from rankfold.optim.accumulation import gaussian


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one(shape: tuple[int, ...] = (6, 10), **options: Any) -> tuple[nn.Parameter, Any]:
    parameter = nn.Parameter(drawn(*shape))
    return parameter, rf.optim.flora([("w", parameter)], **{"lr": 0.1, "rank": 3, **options})


def run(parameter: nn.Parameter, optimizer: Any, steps: range) -> Tensor:
    for step in steps:
        parameter.grad = drawn(*parameter.shape, seed=step + 1).to(parameter.dtype)
        optimizer.step()
    return parameter.detach().clone()


# Momentum ---------------------------------------------------------------------------------------------


class Reference:
    """The update rule, word for word, for a weight whose rows are the shorter side."""

    def __init__(self, weight: Tensor, kappa: int, rank: int = 3, clip: float = 1.0) -> None:
        self.weight, self.kappa, self.rank, self.clip = weight.clone(), kappa, rank, clip
        self.rows, self.columns = torch.zeros(len(weight)).double(), torch.zeros(weight.shape[1]).double()
        self.kept, self.interval = torch.zeros(rank, weight.shape[1]).double(), 0

    def step(self, gradient: Tensor, number: int) -> None:
        decay = 1 - number**-0.8
        squares = gradient.square() + 1e-30
        self.rows = decay * self.rows + (1 - decay) * squares.mean(1)
        self.columns = decay * self.columns + (1 - decay) * squares.mean(0)
        update = gradient / (torch.outer(self.rows, self.columns) / self.rows.mean()).sqrt()
        old = gaussian(self.weight, self.rank, 0, "w", self.interval)
        mixed = 0.1 * update + 0.9 * old.T @ self.kept
        new = old
        if number % self.kappa == 0:
            self.interval += 1
            new = gaussian(self.weight, self.rank, 0, "w", self.interval)
            self.kept = new @ (old.T @ self.kept)
        self.kept = 0.9 * self.kept + 0.1 * new @ update
        size = mixed.square().mean().sqrt()
        rate = 0.1 * max(1e-3, float(self.weight.square().mean().sqrt()))
        self.weight = self.weight - rate * mixed / max(1.0, float(size / self.clip))


@pytest.mark.parametrize("tall", [False, True])
def test_steps_are_those_of_the_paper_over_changes_of_the_projection(tall: bool) -> None:
    shape = (10, 6) if tall else (6, 10)
    parameter, optimizer = one(shape, kappa=2, clip=0.3)
    weight = parameter.detach().T if tall else parameter.detach()
    reference = Reference(weight, 2, clip=0.3)
    for step in range(5):
        run(parameter, optimizer, range(step, step + 1))
        gradient = drawn(*shape, seed=step + 1)
        reference.step(gradient.T if tall else gradient, step + 1)
        found = parameter.detach().T if tall else parameter.detach()
        torch.testing.assert_close(found, reference.weight)


def test_without_momentum_steps_are_those_of_adafactor() -> None:
    parameter, optimizer = one(momentum=0.0, lr=0.01)
    other = nn.Parameter(parameter.detach().clone())
    adafactor = torch.optim.Adafactor([other], lr=0.01, weight_decay=0.0)
    for step in range(6):
        run(parameter, optimizer, range(step, step + 1))
        other.grad = drawn(6, 10, seed=step + 1)
        adafactor.step()
        torch.testing.assert_close(parameter, other)


def test_what_is_kept_is_the_compressed_momentum_and_two_vectors() -> None:
    parameter, optimizer = one()
    run(parameter, optimizer, range(2))
    state = optimizer.state[parameter]
    sizes = {key: tuple(value.shape) for key, value in state.items() if value.is_floating_point()}
    assert sizes == {"exp_avg": (3, 10), "rows": (6,), "columns_mean": (10,)}
    assert not any("seed" in key or "basis" in key for key in state)


@pytest.mark.parametrize(
    ("name", "shape", "compressed"),
    [
        ("w", (4, 16), True),
        ("w", (4, 17), False),  # sides too far apart
        ("w", (16, 4), True),
        ("w", (2, 4), False),  # cannot hold the rank
        ("w", (9,), False),
        ("embed.weight", (8, 8), False),
        ("conv", (4, 3, 4), True),
    ],
)
def test_only_weights_of_some_size_and_shape_have_a_compressed_momentum(
    name: str, shape: tuple[int, ...], compressed: bool
) -> None:
    parameter = nn.Parameter(drawn(*shape))
    optimizer = rf.optim.flora([(name, parameter)], rank=3)
    run(parameter, optimizer, range(1))
    longer = max(shape[0], parameter.numel() // shape[0])
    kept = optimizer.state[parameter]["exp_avg"].shape
    assert kept == ((3, longer) if compressed else shape)


def test_full_momentum_is_a_running_mean_of_normalised_gradients() -> None:
    parameter, optimizer = one((9,), least=None, clip=math.inf, lr=1.0)
    before, mean, squares = parameter.detach().clone(), torch.zeros(9).double(), torch.zeros(9).double()
    for step in range(3):
        gradient, share = drawn(9, seed=step + 1), (step + 1) ** -0.8
        squares = (1 - share) * squares + share * gradient.square()
        mean = 0.9 * mean + 0.1 * gradient / squares.sqrt()
        before = before - mean
        torch.testing.assert_close(run(parameter, optimizer, range(step, step + 1)), before)


def test_a_weight_of_zeros_moves_at_the_least_rate() -> None:
    parameter, optimizer = one(momentum=0.0, least=0.25)
    parameter.data.zero_()
    moved = run(parameter, optimizer, range(1))
    assert moved.square().mean().sqrt() == pytest.approx(0.1 * 0.25, rel=0.05)


def test_projections_come_from_names_and_seeds_not_from_places() -> None:
    def moved(names: list[str], seed: int = 0) -> dict[str, Tensor]:
        weights = {name: nn.Parameter(drawn(6, 10)) for name in names}
        optimizer = rf.optim.flora(weights.items(), 0.1, rank=3, seed=seed)
        for step in range(3):
            for parameter in weights.values():
                parameter.grad = drawn(6, 10, seed=step + 1)
            optimizer.step()
        return {name: parameter.detach() for name, parameter in weights.items()}

    first, second = moved(["a", "b"]), moved(["b", "a"])
    assert torch.equal(first["a"], second["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], moved(["a"], seed=1)["a"])


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", "nearest"), ("bfloat16", "master")])
def test_a_resumed_run_goes_on_bit_for_bit(dtype: str, rounding: str) -> None:
    def made() -> tuple[nn.Parameter, Any]:
        parameter = nn.Parameter(drawn(6, 10).to(getattr(torch, dtype)))
        options = {"rank": 3, "kappa": 3, "rounding": rounding, "weight_decay": 0.1}
        return parameter, rf.optim.flora([("w", parameter)], 0.1, **options)

    whole = run(*made(), range(8))
    parameter, optimizer = made()
    run(parameter, optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, other = made()
    again.data.copy_(parameter)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(again, other, range(4, 8)), whole)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    parameter, optimizer = one()
    before = run(parameter, optimizer, range(2))
    kept = optimizer.state[parameter]["exp_avg"].clone()
    parameter.grad = torch.full_like(parameter, math.nan)
    with pytest.raises(InvalidOption, match="the gradient of w is not finite"):
        optimizer.step()
    assert torch.equal(parameter, before)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], kept)
    with pytest.raises(InvalidOption, match=r"momentum must be in \[0, 1\), not 1"):
        one(momentum=1.0)


def test_stepping_in_backward_is_the_same() -> None:
    layers = [nn.Linear(10, 6, dtype=torch.float64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [rf.optim.flora(layer, 0.1, rank=3) for layer in layers]
    optimizers[1].step_in_backward()
    for step in range(3):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer(drawn(4, 10, seed=step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(layers[0].weight, layers[1].weight)


# Accumulation -----------------------------------------------------------------------------------------


def accumulated(
    gradients: list[Tensor], *, rank: int = 3, seed: int = 0, name: str = "w"
) -> tuple[nn.Parameter, torch.optim.Optimizer, CompressedAccumulation]:
    """Return a weight after backward passes that give it these gradients."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = torch.optim.SGD([(name, parameter)], lr=1.0)
    accumulation = CompressedAccumulation(optimizer, rank, seed=seed)
    for gradient in gradients:
        (parameter * gradient).sum().backward()
    return parameter, optimizer, accumulation


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 5, 2)])
def test_the_optimizer_gets_the_projected_sum_of_the_gradients(shape: tuple[int, ...]) -> None:
    gradients = [drawn(*shape, seed=seed) for seed in range(4)]
    parameter, optimizer, accumulation = accumulated(gradients)
    assert parameter.grad is None
    assert accumulation.state_dict()["sums"]["w"].shape == (3, 10)
    total = torch.stack(gradients).sum(0).reshape(shape[0], -1)
    total = total if shape[0] == 6 else total.T
    basis = gaussian(total, 3, 0, "w", 0)
    wanted = basis.T @ basis @ total
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -(wanted if shape[0] == 6 else wanted.T).reshape(shape))
    assert accumulation.state_dict()["sums"] == {}


def test_sums_are_right_in_the_mean_with_the_known_error() -> None:
    gradient, mean, errors = drawn(10, 12), torch.zeros(10, 12).double(), []
    for seed in range(1500):
        parameter, _, accumulation = accumulated([gradient], seed=seed)
        accumulation.restore()
        assert parameter.grad is not None
        mean += parameter.grad / 1500
        errors.append(float((parameter.grad - gradient).square().sum() / gradient.square().sum()))
    assert (mean - gradient).square().sum() / gradient.square().sum() < 3 * 11 / 3 / 1500
    assert sum(errors) / len(errors) == pytest.approx(11 / 3, rel=0.05)


def test_every_step_has_another_projection_so_that_ranks_add_up() -> None:
    parameter, optimizer, _ = accumulated([drawn(8, 12, seed=seed) for seed in range(2)], rank=2)
    for rounds in (1, 2, 3, 4):
        optimizer.step()
        assert int(torch.linalg.matrix_rank(parameter.detach(), rtol=1e-9)) == 2 * rounds
        optimizer.zero_grad()
        (parameter * drawn(8, 12, seed=9)).sum().backward()


def test_vectors_and_small_weights_are_added_up_as_usual() -> None:
    layer = nn.Linear(3, 12)
    accumulation = CompressedAccumulation(torch.optim.SGD(layer.parameters(), lr=1.0), rank=3)
    for _ in range(2):
        layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((12, 3), 2.0))  # type: ignore[arg-type]
    assert accumulation.state_dict()["sums"] == {}


def test_a_sum_that_was_begun_is_resumed_and_one_of_another_rank_is_refused() -> None:
    gradients = [drawn(6, 10, seed=seed) for seed in range(4)]
    whole, first, _ = accumulated(gradients)
    first.step()
    _, _, half = accumulated(gradients[:2])
    again, second, rest = accumulated([torch.zeros(6, 10).double()])
    rest.load_state_dict(half.state_dict())
    for gradient in gradients[2:]:
        (again * gradient).sum().backward()
    second.step()
    torch.testing.assert_close(again, whole)
    with pytest.raises(Incompatible, match=r"sums of gradients \(3, 10\) as w"):
        accumulated(gradients, rank=2)[2].load_state_dict(half.state_dict())
    with pytest.raises(InvalidRank, match="at least 1, not 0"):
        accumulated(gradients, rank=0)


def test_what_was_begun_is_put_in_place_when_it_ends() -> None:
    parameter, _, accumulation = accumulated([drawn(6, 10)])
    accumulation.remove()
    assert parameter.grad is not None
    parameter.grad = None
    (parameter * drawn(6, 10)).sum().backward()
    torch.testing.assert_close(parameter.grad, drawn(6, 10))


def test_new_projections_learn_what_a_fixed_one_cannot() -> None:
    target, losses = drawn(16, 24), []
    for fixed in (False, True):
        parameter = nn.Parameter(torch.zeros(16, 24, dtype=torch.float64))
        optimizer = torch.optim.SGD([("w", parameter)], lr=0.02)
        accumulation = CompressedAccumulation(optimizer, rank=2)
        for _ in range(200):
            for _ in range(4):
                ((parameter - target).square().sum() / 8).backward()
            optimizer.step()
            optimizer.zero_grad()
            if fixed:
                accumulation.load_state_dict({"round": 0, "sums": {}})
        losses.append(float((parameter.detach() - target).square().sum() / target.square().sum()))
    assert losses[0] < 0.2
    assert losses[1] > 0.8
