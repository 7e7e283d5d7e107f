"""GradNormLoRP moves directions and lengths of rows, as weight normalisation does, in a low rank."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.optim import Adam, Momentum

SGD = Momentum(0.0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one(weight: Tensor, **options: Any) -> tuple[nn.Parameter, Any]:
    parameter = nn.Parameter(weight.clone())
    given = {"lr": 0.05, "rank": 2, "scale": 1.0, **options}
    return parameter, rf.optim.gradnormlorp([("w", parameter)], **given)


def run(parameter: nn.Parameter, optimizer: Any, steps: range) -> Tensor:
    for step in steps:
        parameter.grad = drawn(*parameter.shape, seed=step + 1).to(parameter.dtype)
        optimizer.step()
    return parameter.detach().clone()


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_with_the_full_rank_steps_are_those_of_weight_normalisation(shape: tuple[int, int]) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    parameter, optimizer = one(layer.weight.detach(), rank=5, inner=SGD)
    normal = weight_norm(layer)  # one length for every row
    plain = torch.optim.SGD(normal.parameters(), lr=0.05)
    for step in range(6):
        gradient = drawn(*shape, seed=step + 1)
        plain.zero_grad()
        (normal.weight * gradient).sum().backward()
        plain.step()
        torch.testing.assert_close(run(parameter, optimizer, range(step, step + 1)), normal.weight.detach())
    original = normal.parametrizations.weight
    state = optimizer.state[parameter]
    torch.testing.assert_close(state["magnitude"], original.original0[:, 0].detach())
    torch.testing.assert_close(state["length"], original.original1.norm(dim=1).detach())


def test_lengths_have_adam_of_their_own_whatever_the_rank() -> None:
    weight = drawn(5, 8)
    parameter, optimizer = one(weight, rank=1, inner=Adam(eps=1e-14), weight_decay=0.1)
    lengths = nn.Parameter(weight.norm(dim=1))
    adam = torch.optim.AdamW([lengths], lr=0.05, weight_decay=0.1, eps=1e-14)
    for step in range(4):
        unit = parameter.detach() / parameter.detach().norm(dim=1, keepdim=True)
        lengths.grad = (drawn(5, 8, seed=step + 1) * unit).sum(1)
        adam.step()
        run(parameter, optimizer, range(step, step + 1))
        torch.testing.assert_close(parameter.detach().norm(dim=1), lengths.detach())


def directions(optimizer: Any, parameter: nn.Parameter) -> Tensor:
    """Return V."""
    state = optimizer.state[parameter]
    return parameter.detach() * (state["length"] / state["magnitude"])[:, None]


def test_v_moves_in_a_low_rank_at_right_angles_to_itself() -> None:
    weight = drawn(6, 9)
    parameter, optimizer = one(weight, rank=6, inner=SGD)
    run(parameter, optimizer, range(1))
    change = directions(optimizer, parameter) - weight
    assert (change * weight).sum(1).abs().max() < 1e-12
    parameter, optimizer = one(weight)
    for step in range(3):
        before = weight if step == 0 else directions(optimizer, parameter)
        run(parameter, optimizer, range(step, step + 1))
        change = directions(optimizer, parameter) - before
        assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) == 2


def test_the_state_is_galores_and_four_numbers_a_row() -> None:
    sizes = []
    for name in ("gradnormlorp", "galore"):
        parameter = nn.Parameter(drawn(6, 9))
        optimizer = rf.find_method(name).build([("w", parameter)], rank=2)
        run(parameter, optimizer, range(2))
        sizes.append(sum(value.numel() for value in optimizer.state[parameter].values()))
    assert sizes[0] == sizes[1] + 4 * 6


def test_a_row_of_zeros_takes_the_direction_of_descent() -> None:
    weight = drawn(4, 6)
    weight[1] = 0
    parameter, optimizer = one(weight)
    found = run(parameter, optimizer, range(1))
    gradient = drawn(4, 6, seed=1)
    torch.testing.assert_close(found[1], -0.05 * gradient[1] / gradient[1].norm(), atol=1e-6, rtol=1e-5)
    assert found.isfinite().all()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert parameter.isfinite().all()


def test_a_length_that_changes_its_sign_keeps_its_direction() -> None:
    parameter, optimizer = one(torch.tensor([[3.0, 4.0], [1.0, 0.0]]).double(), rank=1, lr=6.0, inner=SGD)
    start = parameter.detach().clone()
    for _ in range(2):  # straight down its own direction: only the length moves, 5 - 6 - 6
        parameter.grad = torch.tensor([[0.6, 0.8], [0.0, 0.0]]).double()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["magnitude"], torch.tensor([-7.0, 1.0]).double())
    torch.testing.assert_close(parameter.detach()[0], -7 / 5 * start[0])
    torch.testing.assert_close(parameter.detach()[1], start[1])


def test_rows_of_very_different_lengths_are_learned_faster_than_by_galore() -> None:
    sizes = torch.logspace(0, 2, 12, dtype=torch.float64)[:, None]
    target, inputs = sizes * drawn(12, 16), drawn(64, 16, seed=7)
    losses = []
    for name in ("gradnormlorp", "galore"):
        best = math.inf
        for lr in (0.03, 0.3, 3.0):
            parameter = nn.Parameter(sizes * drawn(12, 16, seed=1))
            optimizer = rf.find_method(name).build([("w", parameter)], lr, rank=4, refresh=10, scale=1.0)
            for _ in range(60):
                optimizer.zero_grad()
                loss = (((parameter - target) @ inputs.T) / sizes).square().mean()
                loss.backward()
                optimizer.step()
            best = min(best, float(loss.detach()))
        losses.append(best)
    assert losses[0] < 0.6 * losses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"clip": 0.5, "transport": "reset"}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    def made() -> tuple[nn.Parameter, Any]:
        return one(drawn(6, 9).to(dtype), refresh=3, **options)

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


def test_half_precision_is_steps_on_a_float32_copy_and_nothing_else() -> None:
    weight = drawn(6, 9).bfloat16()
    parameter, optimizer = one(weight)
    other, full = one(weight.float())
    for step in range(5):
        gradient = drawn(6, 9, seed=step).bfloat16()
        parameter.grad, other.grad = gradient, gradient.float()
        optimizer.step()
        full.step()
    assert torch.equal(parameter.detach(), other.detach().bfloat16())
    with pytest.raises(InvalidOption, match="bfloat16 does not bear: use rounding"):
        one(weight, rounding="stochastic")


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    parameter, optimizer = one(drawn(6, 9))
    before = run(parameter, optimizer, range(2))
    parameter.grad = torch.full_like(parameter, math.nan)
    with pytest.raises(InvalidOption, match="the gradient of w is not finite"):
        optimizer.step()
    assert torch.equal(parameter, before)


def test_sparse_gradients_and_changed_shapes_are_refused_before_any_weight_is_rewritten() -> None:
    model = nn.ModuleDict({"first": nn.Linear(6, 4), "table": nn.Embedding(5, 4, sparse=True)})
    optimizer = rf.optim.gradnormlorp(model, 0.1, rank=2, plain=())
    model["table"](torch.tensor([1])).sum().backward()
    model["first"](torch.ones(1, 6)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidOption, match=r"table\.weight has a sparse gradient"):
        optimizer.step()
    model["table"].weight.grad = torch.ones(5, 4)
    optimizer.step()
    after = copy.deepcopy(model.state_dict())
    model["table"].weight.data = torch.ones(4, 4)
    model["table"].weight.grad = torch.ones(4, 4)
    with pytest.raises(InvalidOption, match=r"table\.weight has the shape \(4, 4\), .* made for \(5, 4\)"):
        optimizer.step()
    assert not torch.equal(before["first.weight"], after["first.weight"])
    assert torch.equal(model["first"].weight, after["first.weight"])


def test_kernels_of_convolutions_are_rows_however_they_lie_in_memory() -> None:
    weight, moves = drawn(4, 3, 2, 2), []
    for shape, layout in (((4, 12), torch.contiguous_format), ((4, 3, 2, 2), torch.channels_last)):
        given = weight.reshape(shape)
        parameter, optimizer = one(given.contiguous(memory_format=layout) if len(shape) == 4 else given)
        for step in range(3):
            parameter.grad = drawn(4, 3, 2, 2, seed=step).reshape(shape)
            optimizer.step()
        moves.append(parameter.detach().reshape(4, 12))
    torch.testing.assert_close(*moves)


def test_gradients_are_clipped_together() -> None:
    moves = []
    for names in (("a", "b"), ("a",)):
        weights = {name: nn.Parameter(drawn(6, 9)) for name in names}
        options = {"inner": SGD, "scale": 1.0, "clip": 1e-3}
        optimizer = rf.optim.gradnormlorp(weights.items(), 1.0, rank=2, **options)
        for parameter in weights.values():
            parameter.grad = drawn(6, 9, seed=1)
        optimizer.step()
        moves.append(directions(optimizer, weights["a"]) - drawn(6, 9))
    torch.testing.assert_close(moves[0] * 2**0.5, moves[1], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(moves[1].norm(), torch.tensor(1e-3).double(), rtol=1e-2, atol=0)


def test_stepping_in_backward_is_the_same() -> None:
    layers = [nn.Linear(9, 6, dtype=torch.float64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [rf.optim.gradnormlorp(layer, 0.1, rank=3) for layer in layers]
    optimizers[1].step_in_backward()
    for step in range(3):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer(drawn(4, 9, seed=step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(layers[0].weight, layers[1].weight)
