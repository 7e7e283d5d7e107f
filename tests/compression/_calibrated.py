"""Single layers and their inputs, in float64, for methods that weigh what a layer meets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(count: int = 200, width: int = 12, *, mean: float = 0.0) -> Tensor:
    """Return correlated rows (count, width) whose channels have sizes from 1 down to 0.02."""
    mixed = normal(count, width, seed=1) @ normal(width, width, seed=2)
    return mixed * torch.logspace(0, -1.7, width, dtype=torch.float64) + mean * normal(width, seed=3)


def layer(out: int = 10, width: int = 12, *, bias: bool = True) -> nn.Module:
    """Return a model of one linear layer."""
    model = nn.Sequential(nn.Linear(width, out, bias=bias)).double()
    model[0].weight.data = normal(out, width, seed=4)
    if bias:
        model[0].bias.data = normal(out, seed=5)
    return model


def weight(model: nn.Module) -> Tensor:
    """Return the matrix of the layer, plain or compressed."""
    expression = getattr(model[0], "expression", None)
    found = model[0].weight if expression is None else expression.dense()
    return found.detach()


def leaf(model: nn.Module, name: str) -> Tensor:
    """Return a leaf of the compressed layer."""
    return model[0].expression.leaf(name).tensor().detach()


def keep_of(rank: int, out: int = 10, width: int = 12) -> float:
    """Return the share that a rank takes."""
    return rank * (out + width) / (out * width) + 1e-9


def compressed(model: nn.Module, method: str, rank: int = 3, **options: Any) -> nn.Module:
    """Compress the layer to a rank."""
    out, width = weight(model).shape
    return rf.compress(model, method, keep=keep_of(rank, out, width), progress=False, **options)


def mean_square(before: Tensor, after: Tensor) -> float:
    """Return the mean over rows of the squared distance."""
    return float((before - after).detach().square().sum(-1).mean())
