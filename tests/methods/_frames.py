"""Bases of single weights, and how near they come to the weight."""

from __future__ import annotations

from typing import Any

import torch
from methods._layers import linear, normal
from torch import Tensor, nn

from rankfold.layers import Adaptation, find_targets
from rankfold.methods import registry
from rankfold.methods.site import Basis, Site


def holding(matrix: Tensor) -> nn.Module:
    """Return a model of one linear layer with this weight."""
    model = linear(*matrix.shape).to(matrix.dtype)
    model[0].weight.data = matrix.clone()
    return model


def basis_of(matrix: Tensor, init: str, rank: int, *, seed: int = 0, **options: Any) -> Basis:
    """Return the basis that an initialiser gives for a weight."""
    model = holding(matrix)
    layer = Adaptation(model).layer_for(find_targets(model, ["0"])[0])
    site = Site(path="0", seed=seed, layer=layer, base=layer.base(), shape=layer.shape, dtype=matrix.dtype)
    method = registry.get("init", init)
    basis: Basis = method.build(site, rank, 1.0, **method.checked(options))
    return basis


def product(basis: Basis) -> Tensor:
    """Return the approximation of the weight."""
    middle = torch.diag(basis.values) if basis.middle is None else basis.middle
    return basis.left @ middle @ basis.right


def of_rank(out: int, columns: int, rank: int, *, seed: int = 0) -> Tensor:
    """Return a matrix of that rank."""
    return normal(out, rank, seed=seed) @ normal(rank, columns, seed=seed + 100)


def decaying(out: int, columns: int, *, seed: int = 0, rate: float = 0.8) -> Tensor:
    """Return a matrix whose singular values fall by a constant factor."""
    left, _, right = torch.linalg.svd(normal(out, columns, seed=seed), full_matrices=False)
    return left * rate ** torch.arange(min(out, columns)).double() @ right


def excess(basis: Basis, matrix: Tensor) -> tuple[float, float]:
    """Return the spectral and the Frobenius error as multiples of those of the best approximation."""
    rest, best = (
        torch.linalg.svdvals(matrix - product(basis)),
        torch.linalg.svdvals(matrix)[len(basis.values) :],
    )
    return float(rest[0] / best[0]), float(rest.norm() / best.norm())
