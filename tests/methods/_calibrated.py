"""Batches, losses and dense gradients, for starts that are read from data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from methods._layers import disturbed, normal
from torch import Tensor, nn

import rankfold as rf

Pair = tuple[Tensor, Tensor]


def pairs(out: int = 6, columns: int = 8, *, count: int = 3, tokens: int = 20, seed: int = 5) -> list[Pair]:
    """Return batches of inputs (tokens, columns) and targets (tokens, out); the inputs are not isotropic."""
    widths = torch.linspace(2, 0.3, columns, dtype=torch.float64)
    return [
        (normal(tokens, columns, seed=seed + i) * widths, normal(tokens, out, seed=seed + 50 + i))
        for i in range(count)
    ]


def inputs(columns: int = 8, *, count: int = 3, tokens: int = 20, offset: float = 0.0) -> list[Tensor]:
    """Return batches of inputs (1, tokens, columns), one example each, about an offset."""
    return [(x + offset)[None] for x, _ in pairs(columns=columns, count=count, tokens=tokens)]


def squares(model: nn.Module, batch: Pair) -> Tensor:
    """Return half the summed squared error."""
    x, y = batch
    return (model(x.to(_dtype(model))) - y.to(_dtype(model))).square().sum() / 2


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def mean_gradient(model: nn.Module, batches: list[Pair]) -> Tensor:
    """Return the mean of dL/dW over batches, for a model of one linear layer."""
    total = sum((model(x) - y).T @ x for x, y in batches)
    assert isinstance(total, Tensor)
    return total.detach() / len(batches)


def centred(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return singular values and right singular vectors of all rows, less their mean."""
    rows = torch.cat([batch.flatten(0, -2) for batch in batches])
    _, values, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return values, right


def best(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of that rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def assert_reloads(model: nn.Module, plain: nn.Module, x: Tensor, folder: Path) -> None:
    """Assert that a saved adapter gives the same outputs on the plain model, without any data."""
    rf.save(disturbed(model), folder / "adapter")
    loaded: Any = rf.load(plain, folder / "adapter")
    assert torch.equal(loaded(x), model(x))


def assert_finite(model: nn.Module) -> None:
    """Assert that nothing in a model is NaN or infinite."""
    wrong = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    assert not wrong, wrong
