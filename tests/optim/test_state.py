"""An optimizer's state follows what happens to its parameters."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfold.optim import (
    adam_options,
    first_moments,
    moments,
    reset,
    resize,
    second_moments,
    transform,
    unwrapped,
)
from rankfold.weights import trained


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(kind: Any, parameter: nn.Parameter, steps: int = 3, **options: Any) -> Optimizer:
    optimizer: Optimizer = kind([parameter], lr=1e-2, **options)
    for seed in range(steps):
        parameter.grad = normal(*parameter.shape, seed=seed)
        optimizer.step()
    return optimizer


KINDS = [
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
]
named = pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=lambda value: getattr(value, "__name__", None) or str(value)
)


@named
@pytest.mark.parametrize("axis", [0, 1])
def test_kept_entries_train_on_as_if_nothing_had_happened(kind: Any, options: Any, axis: int) -> None:
    keep, others = torch.tensor([3, 0]), [slice(None)] * 2
    others[axis] = [3, 0]  # type: ignore[call-overload]
    whole, part = nn.Parameter(normal(4, 4)), nn.Parameter(normal(4, 4))
    reference, optimizer = stepped(kind, whole, **options), stepped(kind, part, **options)
    resize(optimizer, part, axis, keep, 1)
    fresh = list(part.shape)
    fresh[axis] = 1
    part.data = torch.cat([part.detach().index_select(axis, keep), torch.zeros(fresh).double()], axis)
    for name, value in moments(optimizer, part).items():
        assert value.shape == part.shape, name
        assert not value.narrow(axis, 2, 1).any()
    part.grad = None
    for seed in range(5, 8):
        whole.grad = normal(4, 4, seed=seed)
        part.grad = torch.cat([whole.grad.index_select(axis, keep), normal(*fresh, seed=seed)], axis)
        reference.step()
        optimizer.step()
    torch.testing.assert_close(part.detach().narrow(axis, 0, 2), whole.detach()[tuple(others)])
    assert part.detach().narrow(axis, 2, 1).isfinite().all()


def test_state_that_does_not_exist_yet_needs_nothing() -> None:
    parameter = nn.Parameter(normal(3, 2))
    optimizer = torch.optim.Adam([parameter])
    resize(optimizer, parameter, 1, torch.tensor([0]), 2)
    reset(optimizer, parameter)
    assert moments(optimizer, parameter) == {}


@pytest.mark.parametrize("columns", [1, 3, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_factored_moments_of_adafactor_follow(axis: int, columns: int) -> None:
    parameter = nn.Parameter(normal(4, columns))
    optimizer = stepped(torch.optim.Adafactor, parameter)
    rows = optimizer.state[parameter]["row_var"].clone()
    sums = optimizer.state[parameter]["col_var"].clone()
    resize(optimizer, parameter, axis, torch.tensor([0]), 2)
    parameter.data = normal(*((3, columns) if axis == 0 else (4, 3)))
    state = optimizer.state[parameter]
    assert state["row_var"].shape == (parameter.shape[0], 1)
    assert state["col_var"].shape == (1, parameter.shape[1])
    assert torch.equal(state["row_var"][:1], rows[:1])
    assert torch.equal(state["col_var"][:, :1], sums[:, :1])
    parameter.grad = normal(*parameter.shape)
    optimizer.step()
    assert parameter.isfinite().all()


@pytest.mark.parametrize("axis", [0, 1])
def test_moments_of_rows_and_columns_follow_where_they_have_the_axis(axis: int) -> None:
    parameter = nn.Parameter(normal(4, 4))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {
        "exp_avg_sq_row": torch.arange(4.0),
        "exp_avg_sq_col": 10 + torch.arange(4.0),
    }
    resize(optimizer, parameter, axis, torch.tensor([2]), 1)
    followed, other = ("row", "col") if axis == 0 else ("col", "row")
    state = optimizer.state[parameter]
    assert state[f"exp_avg_sq_{followed}"].tolist() == [12.0 if axis else 2.0, 0.0]
    assert len(state[f"exp_avg_sq_{other}"]) == 4


def test_state_in_a_form_of_its_own_starts_anew_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(normal(4, 4))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"state1": torch.zeros(4, 4, dtype=torch.uint8), "absmax1": torch.zeros(7)}
    with caplog.at_level(logging.WARNING, "rankfold"):
        resize(optimizer, parameter, 0, torch.tensor([2]), 1)
    assert "SGD keeps state1, absmax1 in a form that cannot follow" in caplog.text
    assert not optimizer.state[parameter]


def test_first_and_second_moments_are_told_apart() -> None:
    parameter = nn.Parameter(normal(3, 2))
    optimizer = stepped(torch.optim.AdamW, parameter, amsgrad=True)
    assert set(first_moments(optimizer, parameter)) == {"exp_avg"}
    assert set(second_moments(optimizer, parameter)) == {"exp_avg_sq", "max_exp_avg_sq"}
    assert set(moments(optimizer, parameter)) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


def test_a_parameter_that_is_reset_trains_as_a_fresh_one() -> None:
    used, fresh = nn.Parameter(normal(3, 2)), nn.Parameter(normal(3, 2))
    optimizer = stepped(torch.optim.AdamW, used)
    fresh.data.copy_(used.data)
    reset(optimizer, used)
    other = torch.optim.AdamW([fresh], lr=1e-2)
    for seed in range(4):
        used.grad, fresh.grad = normal(3, 2, seed=seed), normal(3, 2, seed=seed)
        optimizer.step()
        other.step()
    assert torch.equal(used, fresh)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_part_is_reset_and_the_rest_keeps_its_moments_and_the_count_of_steps(axis: int) -> None:
    parameter = nn.Parameter(normal(4, 4))
    optimizer = stepped(torch.optim.AdamW, parameter)
    before = copy.deepcopy(optimizer.state[parameter])
    reset(optimizer, parameter, torch.tensor([1, 2]), axis)
    after = optimizer.state[parameter]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not after[name].index_select(axis, torch.tensor([1, 2])).any()
        rest = torch.tensor([0, 3])
        assert torch.equal(after[name].index_select(axis, rest), before[name].index_select(axis, rest))
    assert after["step"] == before["step"] == 3


def test_first_moments_transform_as_the_gradient_does() -> None:
    old, new = nn.Parameter(normal(4, 3)), nn.Parameter(normal(4, 2))
    change = normal(3, 2, seed=9)
    mapped, direct = (
        stepped(torch.optim.SGD, old, momentum=0.9),
        torch.optim.SGD([new], lr=1e-2, momentum=0.9),
    )
    for seed in range(3):
        new.grad = normal(4, 3, seed=seed) @ change
        direct.step()
    transform(mapped, old, lambda m: m @ change, lambda v: v @ change**2)
    torch.testing.assert_close(mapped.state[old]["momentum_buffer"], direct.state[new]["momentum_buffer"])


def test_second_moments_transform_by_the_other_map_or_start_at_zero() -> None:
    parameter = nn.Parameter(normal(4, 3))
    optimizer = stepped(torch.optim.AdamW, parameter)
    square = optimizer.state[parameter]["exp_avg_sq"].clone()
    change = normal(3, 2, seed=9)
    transform(optimizer, parameter, lambda m: m @ change, lambda v: v @ change**2)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], square @ change**2)
    parameter.data = normal(4, 2)
    transform(optimizer, parameter, lambda m: m[:, :1])
    assert optimizer.state[parameter]["exp_avg_sq"].tolist() == [[0.0]] * 4


def test_adams_options_say_how_weight_decay_acts_and_others_have_none() -> None:
    parameter = nn.Parameter(normal(3, 2))
    adam = adam_options(torch.optim.Adam([parameter], lr=0.5, betas=(0.1, 0.2), weight_decay=0.3), parameter)
    assert adam is not None
    assert (adam["lr"], adam["betas"], adam["weight_decay"], adam["decoupled"]) == (
        0.5,
        (0.1, 0.2),
        0.3,
        False,
    )
    decoupled = adam_options(torch.optim.AdamW([parameter]), parameter)
    assert decoupled is not None
    assert decoupled["decoupled"]
    assert adam_options(torch.optim.SGD([parameter]), parameter) is None


def test_a_wrapper_is_opened() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    inner = torch.optim.SGD([nn.Parameter(normal(1))])
    assert unwrapped(Wrapper(Wrapper(inner))) is inner
    assert unwrapped(inner) is inner


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_leaf_is_trained_at_its_new_shape_while_an_older_graph_is_held(rank: int) -> None:
    leaf = trained(normal(4, 2), "up")
    parameter = leaf.value
    held = leaf.tensor().sum()
    held.backward()
    leaf.resize(normal(4, rank))
    assert leaf.value is parameter
    assert parameter.grad is None
    (leaf.tensor() * normal(4, rank, seed=3)).sum().backward()
    assert torch.equal(parameter.grad, normal(4, rank, seed=3))
    assert parameter.dtype == torch.float64
    assert held.requires_grad
