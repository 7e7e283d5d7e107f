"""FILA: rows of the weight count by what forgetting needs."""

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


def product(model: nn.Module, scaling: float = 1.0) -> Tensor:
    return scaling * leaves_of(model)["up"] @ leaves_of(model)["down"]


@pytest.mark.parametrize("alpha", [3, 12])
def test_the_product_attains_the_smallest_error_of_the_weighted_rows(alpha: float) -> None:
    model = start(alpha=alpha, epsilon=1e-12)
    weights, matrix = (fisher(FORGET) / fisher(RETAIN)).sum(1).sqrt(), base(model)
    error, plain = ((weights[:, None] * (matrix - z)).norm() for z in (product(model, alpha / 3), best(matrix, 3)))
    torch.testing.assert_close(error, torch.linalg.svdvals(weights[:, None] * matrix)[3:].norm())
    assert error < 0.99 * plain


def test_the_factors_split_the_singular_values_of_the_weighted_rows() -> None:
    model = start(alpha=12, epsilon=1e-12)
    squares_ = (fisher(FORGET) / fisher(RETAIN)).sum(1)
    weights = (squares_ / squares_.mean()).sqrt()
    values = torch.linalg.svdvals(weights[:, None] * base(model))[:3]
    leaves = leaves_of(model)
    weighted = weights[:, None] * leaves["up"]
    torch.testing.assert_close(leaves["down"] @ leaves["down"].T, torch.diag(values / 4), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(weighted.T @ weighted, torch.diag(values / 4), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("factor", [1.0, 1e-3])
def test_a_constant_ratio_gives_pissa(factor: float) -> None:
    scaled = [(x, y) for x, y in RETAIN]
    loss = squares
    model = start(
        forget=scaled, epsilon=1e-12, alpha=6,
        loss=lambda m, batch: loss(m, batch) * (factor if batch[0] is scaled[0][0] else 1.0),
    ) if factor == 1.0 else start(forget=scaled, epsilon=1e-12, alpha=6)  # fmt: skip
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
        forget = [(x, y) for x, y in FORGET]
        boost = torch.ones(6).double()
        boost[2] = factor
        model = start(
            forget=forget, loss=lambda m, batch: ((m(batch[0]) - batch[1]).square() * boost).sum() / 2
        ) if factor == 1 else None  # fmt: skip
        del model
        weights = row_weights(fisher(FORGET) * boost[:, None], fisher(RETAIN), 1e-5)
        matrix = base(adapted("lora", rank=1))
        near = best(weights[:, None] * matrix, 3) / weights[:, None]
        return (matrix - near)[2].norm()

    assert left_out(9.0) < 0.5 * left_out(1.0)


@pytest.mark.parametrize("structure", ["lora", "dora", "gralora"])
def test_the_start_is_the_bases_output(structure: str) -> None:
    x = normal(5, 8)
    torch.testing.assert_close(start(structure, rank=2, alpha=6)(x), linear()(x))


def test_as_a_frame_it_holds_the_same_part_of_the_weight() -> None:
    leaves = leaves_of(start("lora-xs"))
    torch.testing.assert_close(leaves["left"] @ leaves["right"], product(start()))
    right = leaves_of(start("svfit"))["right"]
    torch.testing.assert_close(right @ right.T, torch.eye(3, dtype=torch.float64))
