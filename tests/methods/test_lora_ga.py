"""LoRA-GA: the first step is the best approximation of the full step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._calibrated import assert_reloads, best, mean_gradient, pairs, squares
from methods._layers import adapted, base, change, convolution, leaves_of, linear, normal, sgd_step
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption, InvalidRank

OUT, IN = 12, 10


def start(point: str = "lora", *, rank: int = 2, model: nn.Module | None = None, **options: Any) -> nn.Module:
    given = {
        key: options.pop(key) for key in ("gamma", "directions", "scale", "iterations") if key in options
    }
    recipe = rf.Recipe(point, ("lora-ga", given))
    arguments = {"data": pairs(OUT, IN), "loss": squares, "progress": False, **options}
    return adapted(recipe, linear(OUT, IN) if model is None else model, rank=rank, **arguments)


def gradient() -> Tensor:
    return mean_gradient(linear(OUT, IN), pairs(OUT, IN))


def step(model: nn.Module, rate: float) -> Tensor:
    """Return how one SGD step over the calibration batches moves the weight."""
    before = change(model)
    model.zero_grad()
    batches = pairs(OUT, IN)
    (sum(squares(model, batch) for batch in batches) / len(batches)).backward()  # type: ignore[union-attr]
    sgd_step(model, rate)
    return change(model) - before


@pytest.mark.parametrize("alpha", [2, 6])
def test_the_first_step_tends_to_the_best_approximation_of_rank_2r_of_the_full_step(alpha: float) -> None:
    rate, gamma, scaling = 1e-7, 8, alpha / 2**0.5
    model = start(alpha=alpha, rank_stabilised=True, gamma=gamma)
    expected = -rate * scaling**2 * OUT**0.5 / gamma * best(gradient(), 4)
    assert (step(model, rate) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("directions", ["ArB2r", "A2rBr", "ArBr"])
def test_all_orders_of_the_leading_directions_take_the_same_first_step(directions: str) -> None:
    expected = -1e-7 * best(gradient(), 4)
    assert (step(start(directions=directions, scale="unit"), 1e-7) - expected).norm() < 1e-4 * expected.norm()


def test_no_change_of_rank_r_is_as_near_to_the_gradient_as_the_first_step() -> None:
    full = -gradient()
    moved = step(start(), 1e-7)
    cosine = (moved * full).sum() / moved.norm() / full.norm()
    assert cosine > best(full, 2).norm() / full.norm() + 0.02


@pytest.mark.parametrize(("directions", "ups", "downs"), [
    ("ArB2r", [2, 3], [0, 1]), ("A2rBr", [0, 1], [2, 3]), ("ArBr", [1, 3], [0, 2]),
])  # fmt: skip
def test_the_factors_hold_disjoint_singular_directions_of_the_gradient(
    directions: str, ups: list[int], downs: list[int]
) -> None:
    leaves = leaves_of(start(directions=directions, scale="unit"))
    left, _, right = torch.linalg.svd(gradient(), full_matrices=False)
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close((left[:, ups].T @ leaves["up"]).abs(), eye)
    torch.testing.assert_close((right[downs] @ leaves["down"].T).abs(), eye)


def test_random_directions_are_disjoint_and_depend_on_the_seed_alone() -> None:
    left, _, right = torch.linalg.svd(gradient(), full_matrices=False)
    chosen = []
    for seed in (0, 0, 3):
        leaves = leaves_of(start(directions="random", scale="unit", seed=seed, rank=3))
        ups = (left.T @ leaves["up"]).abs().max(0).indices.tolist()
        downs = (right @ leaves["down"].T).abs().max(0).indices.tolist()
        assert len({*ups, *downs}) == 6
        chosen.append((ups, downs))
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_scales_are_those_of_the_paper() -> None:
    values = torch.linalg.svdvals(base(start()))[:2]
    expected = {
        "stable": OUT**0.25 / 16**0.5, "unit": 1.0, "gd": 1 / 3, "weightS": float((values / 3).sqrt().mean()),
    }  # fmt: skip
    for scale, constant in expected.items():
        leaves = leaves_of(start(scale=scale, alpha=6))
        torch.testing.assert_close(leaves["up"].T @ leaves["up"], constant**2 * torch.eye(2).double())
        torch.testing.assert_close(leaves["down"] @ leaves["down"].T, constant**2 * torch.eye(2).double())


@pytest.mark.parametrize("point", ["lora", "dora", "gralora"])
@pytest.mark.parametrize("alpha", [2, 32])
def test_the_start_is_the_bases_output_and_every_factor_trains(point: str, alpha: float) -> None:
    model, x = start(point, alpha=alpha), normal(5, IN)
    torch.testing.assert_close(model(x), linear(OUT, IN)(x))
    step(model, 0.0)
    assert all(leaf.grad.norm() > 1e-6 for leaf in leaves_of(model).values() if leaf.requires_grad)


def test_a_block_of_a_weight_starts_from_the_gradient_of_the_block() -> None:
    leaves = leaves_of(start("gralora", rank=2, scale="unit", k=2))
    left, _, right = torch.linalg.svd(gradient()[: OUT // 2, IN // 2 :])
    block_up, block_down = leaves["up"][0][:, 1], leaves["down"][1][0]
    torch.testing.assert_close((left[:, 1] @ block_up).abs(), torch.tensor(1.0).double())
    torch.testing.assert_close((right[0] @ block_down).abs(), torch.tensor(1.0).double())


def test_a_rank_whose_double_the_weight_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidRank, match=r"0: rank 6 is more than its weight .* choose rank <= 5"):
        start(rank=6)
    start(rank=5)


def test_a_weight_without_a_gradient_is_named() -> None:
    with pytest.raises(InvalidOption, match="0: its gradient is zero, and lora-ga starts from directions"):
        start(loss=lambda model, batch: 0 * squares(model, batch))


def test_a_gradient_of_low_rank_gives_directions_that_are_still_orthonormal() -> None:
    x, y = pairs(OUT, IN)[0]
    leaves = leaves_of(start(data=[(x[:1], y[:1])], scale="unit", rank=4))
    torch.testing.assert_close(leaves["up"].T @ leaves["up"], torch.eye(4).double())


def test_a_randomised_decomposition_is_close_to_the_exact_one() -> None:
    exact, randomised = (leaves_of(start(iterations=count))["down"] for count in (None, 8))
    torch.testing.assert_close(randomised, exact, atol=1e-3, rtol=0)


def test_a_model_in_half_precision_starts_at_its_base() -> None:
    model = start(model=linear(OUT, IN).bfloat16())
    assert leaves_of(model)["up"].dtype == torch.float32
    x = normal(5, IN).bfloat16()
    assert (model(x) - linear(OUT, IN).bfloat16()(x)).abs().max() < 0.02


def test_a_convolution_starts_at_its_base() -> None:
    x = normal(2, 4, 6, 5)
    model = start(
        model=convolution(), data=[(x, torch.zeros(()).double())],
        loss=lambda model, batch: model(batch[0]).square().sum(),
    )  # fmt: skip
    torch.testing.assert_close(model(x), convolution()(x))


def test_the_adapter_loads_without_data(tmp_path: Path) -> None:
    assert_reloads(start(), linear(OUT, IN), normal(5, IN), tmp_path)


@pytest.mark.parametrize("option", [{"gamma": 0.0}, {"directions": "up"}, {"scale": "x"}, {"iterations": -1}])
def test_options_out_of_range_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"lora-ga: {next(iter(option))} must be"):
        start(**option)
