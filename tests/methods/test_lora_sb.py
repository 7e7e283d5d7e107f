"""LoRA-SB: a core between the singular bases of the first full step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._calibrated import assert_reloads, best, mean_gradient, pairs, squares
from methods._layers import adapted, base, change, count, leaves_of, linear, normal, sgd_step
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption

DATA = {"data": pairs(), "loss": squares, "progress": False, "lr": 0.01}


def start(*, rank: int = 3, model: nn.Module | None = None, **options: Any) -> nn.Module:
    names = ("warmup_steps", "iterations")
    recipe = rf.Recipe("lora-xs", ("lora-sb", {key: options.pop(key) for key in names if key in options}))
    return adapted(recipe, model, rank=rank, **{**DATA, **options})


def gradient() -> Tensor:
    return mean_gradient(linear(), pairs())


@pytest.mark.parametrize("alpha", [None, 12])
@pytest.mark.parametrize("warmup", [1, 20])
def test_the_change_is_the_best_approximation_of_the_first_sign_step(
    alpha: float | None, warmup: int
) -> None:
    model = start(alpha=alpha, warmup_steps=warmup)
    torch.testing.assert_close(
        change(model), best(-0.01 / warmup * gradient().sign(), 3), atol=1e-12, rtol=1e-9
    )


def test_the_change_is_as_large_as_the_leading_singular_values() -> None:
    values = torch.linalg.svdvals(0.01 * gradient().sign())[:3]
    torch.testing.assert_close(change(start()).norm(), values.norm())


def test_the_outer_factors_are_orthonormal_and_frozen() -> None:
    leaves = leaves_of(start())
    for side in (leaves["left"].T @ leaves["left"], leaves["right"] @ leaves["right"].T):
        torch.testing.assert_close(side, torch.eye(3, dtype=torch.float64))
    assert [name for name, leaf in leaves.items() if leaf.requires_grad] == ["core"]
    assert count(start()) == 9


@pytest.mark.parametrize("alpha", [None, 12])
def test_the_first_step_moves_the_weight_by_the_projected_gradient(alpha: float | None) -> None:
    model, scaling, rate = start(alpha=alpha), 1 if alpha is None else 4, 0.1
    before, leaves, (x, y) = change(model), leaves_of(model), pairs()[1]
    dense = ((model(x) - y).T @ x).detach()
    squares(model, (x, y)).backward()
    sgd_step(model, rate)
    left, right = leaves["left"] @ leaves["left"].T, leaves["right"].T @ leaves["right"]
    torch.testing.assert_close(change(model) - before, -rate * scaling**2 * left @ dense @ right)


def test_it_falls_faster_than_the_bases_of_the_weight() -> None:
    # The core spans the weight's own singular bases without an initialiser.
    def loss_after(model: nn.Module) -> float:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(30):
            optimizer.zero_grad()
            loss = squares(model, (x, y))
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    x = normal(100, 16)
    target = linear(12, 16)[0].weight.detach() + 0.3 * normal(12, 2, seed=8) @ normal(2, 16, seed=9)
    y = x @ target.T
    given = {"data": [(x, y)], "loss": squares, "progress": False, "lr": 0.02}
    ours = adapted("lora-sb", linear(12, 16), rank=4, **given)
    assert loss_after(ours) < 0.7 * loss_after(adapted("lora-xs", linear(12, 16), rank=4))


def test_named_alone_it_means_the_small_core() -> None:
    assert torch.equal(change(adapted("lora-sb", rank=3, **DATA)), change(start()))


def test_only_signs_are_read() -> None:
    small = start(loss=lambda model, batch: 1e-9 * squares(model, batch))
    torch.testing.assert_close(change(small), change(start()))


def test_the_stored_weight_is_not_edited() -> None:
    assert torch.equal(base(start()), linear()[0].weight)


def test_a_weight_without_a_gradient_is_named() -> None:
    with pytest.raises(InvalidOption, match="0: its gradient is zero, and lora-sb starts from directions"):
        start(loss=lambda model, batch: 0 * squares(model, batch))


def test_a_model_in_half_precision_keeps_orthonormal_factors(tmp_path: Path) -> None:
    model = start(model=linear().bfloat16())
    left = leaves_of(model)["left"]
    torch.testing.assert_close(left.T @ left, torch.eye(3), atol=1e-5, rtol=0)
    assert_reloads(model, linear().bfloat16(), normal(5, 8).bfloat16(), tmp_path)


def test_a_randomised_decomposition_is_close_to_the_exact_one() -> None:
    torch.testing.assert_close(change(start(iterations=10)), change(start()), atol=1e-4, rtol=0)


def test_it_asks_for_the_learning_rate_and_positive_numbers() -> None:
    with pytest.raises(InvalidOption, match="pass lr="):
        start(lr=None)
    for options in ({"warmup_steps": 0}, {"iterations": -1}):
        with pytest.raises(InvalidOption, match=f"lora-sb: {next(iter(options))} must be"):
            start(**options)


def test_a_structure_of_two_factors_refuses_it() -> None:
    with pytest.raises(Incompatible, match="two outer factors and a core"):
        adapted("lora/lora-sb", rank=3, **DATA)
