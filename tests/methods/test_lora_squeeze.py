"""LoRA-Squeeze: the rank is halved during training, and the optimizer's state follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import change, leaves_of, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.linalg import squeeze_factors

TARGETS = ["0", "2"]


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def point(structure: str = "lora", **options: Any) -> rf.Recipe:
    return rf.Recipe(structure, ranks=("lora-squeeze", options))


def ranks_of(model: nn.Module) -> list[int]:
    return [leaves_of(model, path)["up"].shape[1] for path in TARGETS]


def train(
    model: nn.Module, optimizer: Any, steps: range, after: Callable[[int], None] = lambda step: None
) -> None:
    x, target = normal(32, 12), normal(32, 10, seed=2)
    for step in steps:
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        after(step + 1)


def started(recipe: rf.Recipe, total: int = 16) -> tuple[nn.Module, Any, Any]:
    model = rf.adapt(net(), recipe, rank=2, targets=TARGETS, alpha=4)
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-2))
    return model, optimizer, rf.attach(model, optimizer, total_steps=total)


def test_the_rank_is_halved_at_equal_intervals_down_to_the_one_asked_for() -> None:
    model, optimizer, _ = started(point(times=4, final=0.25))
    seen = {0: ranks_of(model)}
    train(model, optimizer, range(16), lambda step: seen.update({step: ranks_of(model)}))
    assert [seen[step][0] for step in (0, 5, 6, 11, 12, 16)] == [8, 8, 4, 4, 2, 2]


def test_a_multiple_that_is_no_power_of_two_ends_at_the_rank_asked_for() -> None:
    model, optimizer, _ = started(point(times=3))
    seen: list[int] = []
    train(model, optimizer, range(16), lambda step: seen.append(ranks_of(model)[0]))
    assert list(dict.fromkeys(seen)) == [6, 3, 2]


def test_a_squeeze_changes_the_weight_by_the_singular_values_that_it_drops() -> None:
    model, optimizer, handle = started(point(times=2, final=0.0), total=8)
    train(model, optimizer, range(4))
    before = change(model, "0")
    run = handle.run
    rule = handle.methods["ranks=lora-squeeze"]
    rule.squeeze(run, run.pairs[0], 2)
    dropped = torch.linalg.vector_norm(torch.linalg.svdvals(before)[2:])
    torch.testing.assert_close(torch.linalg.vector_norm(change(model, "0") - before), dropped)


def test_a_squeeze_that_drops_nothing_changes_no_output() -> None:
    model, optimizer, handle = started(point(times=2), total=8)
    train(model, optimizer, range(2))
    leaves = leaves_of(model, "0")
    leaves["up"].data[:, 2:] = leaves["up"].data[:, :2]
    x = normal(5, 12)
    before = model(x)
    handle.methods["ranks=lora-squeeze"].squeeze(handle.run, handle.run.pairs[0], 2)
    torch.testing.assert_close(model(x), before)


def squeezed_state(recipe: rf.Recipe) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], Any]:
    """Return the gradients at the factors before and after a lossless squeeze, and Adam's states after it.

    The moments are the gradients of before, so that what they are mapped to can be compared.
    """
    model, optimizer, handle = started(recipe, total=8)
    train(model, optimizer, range(2))
    leaves = leaves_of(model, "0")
    leaves["up"].data[:, 2:] = leaves["up"].data[:, :2]
    x, weights = normal(5, 12), normal(5, 10, seed=4)

    def gradients() -> dict[str, Tensor]:
        optimizer.zero_grad()
        (model(x) * weights).sum().backward()
        return {name: leaves[name].grad.clone() for name in ("up", "down")}  # type: ignore[union-attr]

    before = gradients()
    for name, gradient in before.items():
        optimizer.state[leaves[name]]["exp_avg"] = gradient.clone()
        optimizer.state[leaves[name]]["exp_avg_sq"] = gradient.square()
    handle.methods["ranks=lora-squeeze"].squeeze(handle.run, handle.run.pairs[0], 2)
    return before, {n: optimizer.state[leaves[n]] for n in before}, gradients(), handle


def test_first_moments_are_mapped_exactly_as_gradients_are() -> None:
    _, states, after, _ = squeezed_state(point(times=2))
    for name, gradient in after.items():
        torch.testing.assert_close(states[name]["exp_avg"], gradient, atol=1e-12, rtol=1e-9)


def test_second_moments_are_mapped_by_the_squares_of_the_coefficients() -> None:
    model, optimizer, handle = started(point(times=2), total=8)
    train(model, optimizer, range(2))
    leaves = leaves_of(model, "0")
    before = {name: optimizer.state[leaves[name]]["exp_avg_sq"].clone() for name in ("up", "down")}
    maps = squeeze_factors(leaves["up"].detach(), leaves["down"].detach(), 2)
    handle.methods["ranks=lora-squeeze"].squeeze(handle.run, handle.run.pairs[0], 2)
    wanted = {"up": before["up"] @ maps.down_map.T.square(), "down": maps.up_map.T.square() @ before["down"]}
    for name, second in wanted.items():
        torch.testing.assert_close(optimizer.state[leaves[name]]["exp_avg_sq"], second, atol=0, rtol=1e-9)


def test_moments_can_be_reset_with_the_step_count() -> None:
    _, states, after, _ = squeezed_state(point(times=2, moments="reset"))
    for name, gradient in after.items():
        assert states[name]["step"] == 0
        for moment in ("exp_avg", "exp_avg_sq"):
            assert states[name][moment].shape == gradient.shape
            assert torch.count_nonzero(states[name][moment]) == 0


@pytest.mark.parametrize("moments", ["transfer", "reset"])
def test_training_falls_and_ends_at_the_rank(moments: str) -> None:
    model, optimizer, _ = started(point(moments=moments), total=60)
    losses: list[float] = []
    x, target = normal(32, 12), normal(32, 10, seed=2)
    train(model, optimizer, range(60), lambda step: losses.append((model(x) - target).square().mean().item()))
    assert losses[-1] < 0.8 * losses[0]
    assert ranks_of(model) == [2, 2]


def test_a_zero_product_can_still_train_after_a_squeeze() -> None:
    model, _, handle = started(point(times=2))
    handle.methods["ranks=lora-squeeze"].squeeze(handle.run, handle.run.pairs[0], 2)
    leaves = leaves_of(model, "0")
    assert torch.count_nonzero(leaves["up"]) == 0
    assert (leaves["down"].abs().sum(1) > 0).all()


@pytest.mark.parametrize("structure", ["lora", "dora", "hira"])
@pytest.mark.parametrize("stop", [5, 7])
def test_resumed_training_is_the_same_bit_for_bit(structure: str, stop: int, tmp_path: Path) -> None:
    recipe = point(structure, times=2, final=0.6)
    options = {} if structure == "hira" else {"alpha": 4}
    model = rf.adapt(net(), recipe, rank=2, targets=TARGETS, **options)
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-2))

    def keep(step: int) -> None:
        if step == stop:
            rf.save(model, tmp_path / "adapter")
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    with rf.attach(model, optimizer, total_steps=16):
        train(model, optimizer, range(16), keep)
    again = rf.load(net(), tmp_path / "adapter")
    other = torch.optim.AdamW(rf.param_groups(again, lr=1e-2))
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    with rf.attach(again, other, total_steps=16):
        train(again, other, range(stop, 16))
    x = normal(5, 12)
    assert torch.equal(model(x), again(x))
    assert ranks_of(again) == [2, 2]


def test_a_training_too_short_for_its_squeezes_is_refused() -> None:
    with pytest.raises(InvalidOption, match="no room for 3 squeezes"):
        started(point(times=8, final=0.5), total=4)


@pytest.mark.parametrize("options", [{"times": 0.5}, {"final": 1.0}, {"moments": "keep"}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"lora-squeeze: {next(iter(options))} must be"):
        rf.adapt(net(), point(**options), rank=2, targets=TARGETS)


def test_it_needs_the_total_of_steps() -> None:
    model = rf.adapt(net(), point(), rank=2, targets=TARGETS)
    with pytest.raises(InvalidOption, match="total_steps"):
        rf.attach(model, torch.optim.SGD(rf.param_groups(model, lr=0.1)))


def test_there_is_no_gate_and_an_initialiser_behind_one_is_refused() -> None:
    model = rf.adapt(net(), point(), rank=2, targets=TARGETS)
    assert sorted(leaves_of(model, "0")) == ["down", "up"]
    with pytest.raises(rf.errors.Incompatible, match="behind a gate"):
        rf.adapt(net(), rf.Recipe("lora", init="random", ranks="lora-squeeze"), rank=2)
