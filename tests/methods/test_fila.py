"""FILA: rows of the weight count by what forgetting needs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._calibrated import assert_finite, assert_reloads, best, pairs, squares
from methods._layers import adapted, backward, base, leaves_of, linear, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.inits.fila import row_weights

FORGET, RETAIN = pairs(count=2), pairs(count=2, seed=105)


def start(
    point: str = "lora", *, rank: int = 3, model: nn.Module | None = None, epsilon: float = 1e-5,
    forget: Any = FORGET, retain: Any = RETAIN, **options: Any,
) -> nn.Module:  # fmt: skip
    recipe = rf.Recipe(point, ("fila", {"epsilon": epsilon}))
    data = {"forget": forget, "retain": retain}
    return adapted(recipe, model, rank=rank, **{"data": data, "loss": squares, "progress": False, **options})


def fisher(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean squared gradient, weighted by the number of examples."""
    model = linear()
    squares_ = [(((model(x) - y).T @ x).detach().square(), len(x)) for x, y in batches]
    return sum(s * n for s, n in squares_) / sum(n for _, n in squares_)  # type: ignore[return-value]


def boosted(
    batches: list[tuple[Tensor, Tensor]], factor: float = 1.0, row: int | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return batches with a weight for every output, one or all of them larger."""
    weights = torch.ones(6).double()
    weights[slice(None) if row is None else row] = factor
    return [(x, y, weights) for x, y in batches]


def by_rows(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return half the summed squared error of the weighted outputs."""
    x, y, weights = batch
    return ((model(x) - y).square() * weights).sum() / 2


def product(model: nn.Module, scaling: float = 1.0) -> Tensor:
    return scaling * leaves_of(model)["up"] @ leaves_of(model)["down"]


@pytest.mark.parametrize("alpha", [3, 12])
def test_the_product_attains_the_smallest_error_of_the_weighted_rows(alpha: float) -> None:
    model = start(alpha=alpha, epsilon=1e-12)
    weights, matrix = (fisher(FORGET) / fisher(RETAIN)).sum(1).sqrt(), base(model)
    error, plain = (
        (weights[:, None] * (matrix - z)).norm() for z in (product(model, alpha / 3), best(matrix, 3))
    )
    torch.testing.assert_close(error, torch.linalg.svdvals(weights[:, None] * matrix)[3:].norm())
    assert error < 0.99 * plain


def test_the_factors_split_the_singular_values_of_the_weighted_rows() -> None:
    model = start(alpha=12, epsilon=1e-12)
    squares_ = (fisher(FORGET) / fisher(RETAIN)).sum(1)
    weights = (squares_ / squares_.mean()).sqrt()
    values = torch.linalg.svdvals(weights[:, None] * base(model))[:3]
    leaves = leaves_of(model)
    weighted = weights[:, None] * leaves["up"]
    torch.testing.assert_close(
        leaves["down"] @ leaves["down"].T, torch.diag(values / 4), atol=1e-9, rtol=1e-7
    )
    torch.testing.assert_close(weighted.T @ weighted, torch.diag(values / 4), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("factor", [1.0, 0.01])
def test_a_constant_ratio_gives_pissa(factor: float) -> None:
    model = start(
        forget=boosted(RETAIN, factor), retain=boosted(RETAIN), loss=by_rows, epsilon=1e-12, alpha=6
    )
    ours, pissa = leaves_of(model), leaves_of(adapted("lora/pissa", rank=3, alpha=6))
    for name in ("up", "down"):
        torch.testing.assert_close(ours[name].abs(), pissa[name].abs(), atol=1e-8, rtol=1e-6)


def test_the_weights_of_rows_do_not_depend_on_the_size_of_either_gradient() -> None:
    forget, retain = fisher(FORGET), fisher(RETAIN)
    weights = row_weights(forget, retain, 1e-5)
    assert weights.square().mean().item() == pytest.approx(1)
    torch.testing.assert_close(row_weights(1e-9 * forget, retain, 1e-5), weights)
    torch.testing.assert_close(row_weights(forget, 1e-12 * retain, 1e-5), weights)


def test_a_row_that_forgetting_needs_more_is_taken_into_the_adapter() -> None:
    def left_out(factor: float) -> Tensor:
        model = start(forget=boosted(FORGET, factor, row=2), retain=boosted(RETAIN), loss=by_rows)
        return (base(model) - product(model))[2].norm()

    assert left_out(10.0) < 0.5 * left_out(1.0)


@pytest.mark.parametrize("structure", ["lora", "dora", "gralora"])
def test_the_start_is_the_bases_output(structure: str) -> None:
    x = normal(5, 8)
    torch.testing.assert_close(start(structure, rank=2, alpha=6)(x), linear()(x))


def test_as_a_frame_it_holds_the_same_part_of_the_weight() -> None:
    leaves = leaves_of(start("lora-xs"))
    torch.testing.assert_close(leaves["left"] @ leaves["right"], product(start()))
    right = leaves_of(start("svfit"))["right"]
    torch.testing.assert_close(right @ right.T, torch.eye(3, dtype=torch.float64))


def test_a_row_that_forgetting_does_not_need_keeps_its_projection() -> None:
    model = start(forget=boosted(FORGET, 0.0, row=2), retain=boosted(RETAIN), loss=by_rows)
    assert_finite(model)
    right = leaves_of(model)["down"]
    projected = base(model)[2] @ torch.linalg.pinv(right) @ right
    torch.testing.assert_close(product(model)[2], projected)
    torch.testing.assert_close(model(normal(5, 8)), linear()(normal(5, 8)))


def test_sets_without_gradients_are_borne() -> None:
    nothing, all_ = boosted(RETAIN, 0.0), boosted(FORGET)
    model = start(forget=nothing, retain=all_, loss=by_rows)
    torch.testing.assert_close(product(model), product(adapted("lora/pissa", rank=3)))
    model = start(forget=all_, retain=nothing, loss=by_rows)
    torch.testing.assert_close(
        row_weights(fisher(FORGET), torch.zeros(6, 8).double(), 1e-5),
        (fisher(FORGET).sum(1) / fisher(FORGET).sum(1).mean()).sqrt(),
    )
    torch.testing.assert_close(model(normal(5, 8)), linear()(normal(5, 8)))


@pytest.mark.parametrize("rank", [2, 0])
def test_a_weight_of_low_rank_starts_at_its_base(rank: int) -> None:
    for point in ("lora", "lora-xs"):
        model, x = start(point, model=linear(rank=rank)), normal(5, 8)
        assert_finite(model)
        torch.testing.assert_close(model(x), linear(rank=rank)(x), atol=1e-3, rtol=0)
        backward(model, x)
        assert all(leaf.grad.isfinite().all() for leaf in leaves_of(model).values() if leaf.requires_grad)


def test_it_asks_for_both_sets_by_name() -> None:
    with pytest.raises(
        InvalidOption, match=re.escape('data={"forget": batches, "retain": batches}; the command')
    ):
        start(data=FORGET)


def test_the_adapter_loads_without_data_in_single_precision_over_half(tmp_path: Path) -> None:
    model = start(model=linear().bfloat16())
    assert leaves_of(model)["up"].dtype == torch.float32
    assert_reloads(model, linear().bfloat16(), normal(5, 8).bfloat16(), tmp_path)


def test_an_epsilon_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InvalidOption, match="epsilon must be positive"):
        start(epsilon=0.0)
