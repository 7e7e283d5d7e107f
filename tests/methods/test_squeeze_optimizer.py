"""A squeeze in the middle of training: the optimizer's state follows the factors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import adapted, change, disturbed, leaves_of, linear, normal, trained
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.linalg import squeeze_factors

BETAS = (0.9, 0.999)


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    x, target = normal(32, 8), normal(32, 6, seed=2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def begun(
    point: str | rf.Recipe = "lora", make: Any = torch.optim.AdamW, **options: Any
) -> tuple[nn.Module, Any]:
    model = disturbed(adapted(point, rank=5, alpha=7.0))
    optimizer = make(rf.param_groups(model, lr=1e-2), **options)
    train(model, optimizer, 3)
    return model, optimizer


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the factors for one gradient of the weight."""
    model.zero_grad()
    (model(x) * normal(len(x), 6, seed=9)).sum().backward()
    return {name: leaf.grad.clone() for name, leaf in leaves_of(model).items() if leaf.grad is not None}


def as_moments(model: nn.Module, optimizer: Any, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        optimizer.state[leaves_of(model)[name]]["exp_avg"] = value.clone()


def rank_deficient(model: nn.Module, rank: int) -> nn.Module:
    leaves = leaves_of(model)
    width = leaves["up"].shape[1]
    leaves["up"].data = normal(6, rank, seed=4) @ normal(rank, width, seed=5)
    return model


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("point", ["lora", "dora", rf.Recipe("lora", init="kaiming", ranks="adalora")])
def test_first_moments_are_mapped_exactly_as_gradients_are(point: str | rf.Recipe, weigh: bool) -> None:
    model, optimizer = begun(point)
    rank_deficient(model, 2)  # nothing is dropped, so the gradient of the weight stays what it was
    x = normal(20, 8, seed=6)
    data = [normal(30, 8, seed=7)] if weigh else None
    as_moments(model, optimizer, gradients(model, x))
    rf.squeeze(model, 2, optimizer=optimizer, data=data, progress=False)
    for name, gradient in gradients(model, x).items():
        if name in ("up", "down"):
            moment = optimizer.state[leaves_of(model)[name]]["exp_avg"]
            torch.testing.assert_close(moment, gradient, atol=1e-12, rtol=1e-12)


def test_second_moments_are_mapped_by_the_squares_of_the_coefficients() -> None:
    model, optimizer = begun(amsgrad=True)
    leaves = leaves_of(model)
    maps = squeeze_factors(leaves["up"].detach(), leaves["down"].detach(), 2)
    old = {n: copy.deepcopy(optimizer.state[leaves[n]]) for n in ("up", "down")}
    rf.squeeze(model, 2, optimizer=optimizer)
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        new = {n: optimizer.state[leaves[n]][key] for n in ("up", "down")}
        torch.testing.assert_close(new["up"], old["up"][key] @ maps.down_map.T.square())
        torch.testing.assert_close(new["down"], maps.up_map.T.square() @ old["down"][key])


def test_training_goes_on_exactly_from_the_mapped_moments() -> None:
    """One step of Adam by hand, from the moments as mapped, is the step that the optimizer takes."""
    model, optimizer = begun(make=torch.optim.Adam)
    leaves = leaves_of(model)
    up, down = (leaves[name].detach().clone() for name in ("up", "down"))
    old = {n: copy.deepcopy(optimizer.state[leaves[n]]) for n in ("up", "down")}
    maps = squeeze_factors(up, down, 2)
    rf.squeeze(model, 2, optimizer=optimizer)
    x = normal(20, 8, seed=6)
    found = gradients(model, x)
    factors = {"up": maps.up, "down": maps.down}
    first = {"up": maps.moved_up(old["up"]["exp_avg"]), "down": maps.moved_down(old["down"]["exp_avg"])}
    second = {
        "up": old["up"]["exp_avg_sq"] @ maps.down_map.T.square(),
        "down": maps.up_map.T.square() @ old["down"]["exp_avg_sq"],
    }
    optimizer.step()
    for name, gradient in found.items():
        m = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
        v = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient.square()
        m, v = m / (1 - BETAS[0] ** 4), v / (1 - BETAS[1] ** 4)  # the fourth step, as if nothing had happened
        wanted = factors[name] - 1e-2 * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(leaves_of(model)[name].detach(), wanted, atol=1e-12, rtol=1e-12)


def test_training_resumed_after_a_squeeze_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = begun()
    rf.squeeze(model, 2, optimizer=optimizer)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    again = rf.load(linear(), rf.save(model, tmp_path / "adapter"))
    other = torch.optim.AdamW(rf.param_groups(again, lr=1e-2))
    other.load_state_dict(state)
    for each, steps in ((model, optimizer), (again, other)):
        train(each, steps, 3)
    assert torch.equal(change(model), change(again))


def test_the_parameters_and_the_groups_stay_the_same_objects() -> None:
    model, optimizer = begun()
    before = [id(p) for group in optimizer.param_groups for p in group["params"]]
    rf.squeeze(model, 2, optimizer=optimizer)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == before
    assert {id(p) for p in trained(model).values()} == set(before)
    train(model, optimizer, 2)


def test_a_gate_leaves_the_optimizer_with_its_state() -> None:
    model, optimizer = begun(rf.Recipe("lora", init="kaiming", ranks="sora"))
    gate = leaves_of(model)["gate"]
    assert gate in optimizer.state
    rf.squeeze(model, 2, optimizer=optimizer)
    assert gate not in optimizer.state
    assert all(p is not gate for group in optimizer.param_groups for p in group["params"])
    train(model, optimizer, 2)


def test_moments_along_a_closed_gate_stay_out_of_the_new_ones() -> None:
    model, optimizer = begun(rf.Recipe("lora", init="kaiming", ranks="adalora"))
    leaves_of(model)["gate"].data[1] = 0
    x = normal(20, 8, seed=6)
    as_moments(model, optimizer, gradients(model, x))
    optimizer.state[leaves_of(model)["down"]]["exp_avg"][1] = 1e9
    for data in (None, [normal(30, 8, seed=7)]):
        copied, state = copy.deepcopy((model, optimizer))
        rf.squeeze(copied, 4, optimizer=state, data=data, progress=False)
        for name, gradient in gradients(copied, x).items():
            moment = state.state[leaves_of(copied)[name]]["exp_avg"]
            torch.testing.assert_close(moment, gradient, atol=1e-10, rtol=1e-10)


def test_without_a_rank_the_moments_of_the_terms_that_stay_stay_bit_for_bit() -> None:
    model, optimizer = begun()
    leaves = leaves_of(model)
    leaves["up"].data[:, 1] = 0
    old = {n: optimizer.state[leaves[n]]["exp_avg"].clone() for n in ("up", "down")}
    rf.squeeze(model, optimizer=optimizer)
    keep = [0, 2, 3, 4]
    assert torch.equal(optimizer.state[leaves["up"]]["exp_avg"], old["up"][:, keep])
    assert torch.equal(optimizer.state[leaves["down"]]["exp_avg"], old["down"][keep])


def test_where_a_start_is_subtracted_moments_and_steps_begin_again() -> None:
    model, optimizer = begun("lora/pissa")
    before = change(model)
    rf.squeeze(model, 6, optimizer=optimizer)
    torch.testing.assert_close(change(model), before)  # rank 6 of 6 rows: nothing is lost
    for leaf in leaves_of(model).values():
        state = optimizer.state[leaf]
        assert state["exp_avg"].shape == leaf.shape
        assert torch.count_nonzero(state["exp_avg"]) == torch.count_nonzero(state["exp_avg_sq"]) == 0
        assert int(state["step"]) == 0
    train(model, optimizer, 2)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.Adafactor, {}),
        (torch.optim.Adamax, {}),
    ],
)
def test_any_optimizer_of_the_usual_shape_goes_on(make: Any, options: dict[str, Any]) -> None:
    model, optimizer = begun(make=make, **options)
    rf.squeeze(model, 2, optimizer=optimizer)
    train(model, optimizer, 2)
    assert all(torch.isfinite(leaf).all() for leaf in leaves_of(model).values())


def test_before_the_first_step_there_is_nothing_to_move() -> None:
    model = disturbed(adapted("lora", rank=5))
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-2))
    rf.squeeze(model, 2, optimizer=optimizer)
    assert not optimizer.state
    train(model, optimizer, 2)


def test_dynamics_begin_anew_after_a_squeeze() -> None:
    model = disturbed(adapted("lora/lora-squeeze", rank=2))
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-2))
    with rf.attach(model, optimizer, total_steps=8):
        train(model, optimizer, 3)
    rf.squeeze(model, 1, optimizer=optimizer)
    assert all("rankfold" not in group for group in optimizer.param_groups)
    assert rf.attach(model, optimizer).run is None
    train(model, optimizer, 2)


def test_an_optimizer_of_other_parameters_is_refused_and_the_model_stays() -> None:
    model = disturbed(adapted("lora", rank=4))
    before = change(model)
    with pytest.raises(InvalidOption, match="does not hold up of 0"):
        rf.squeeze(model, 2, optimizer=torch.optim.SGD(linear().parameters(), lr=0.1))
    with pytest.raises(InvalidOption, match="one of PyTorch"):
        rf.squeeze(model, 2, optimizer=object())
    assert torch.equal(change(model), before)
