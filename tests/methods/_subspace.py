"""A small model whose weights all move in one subspace."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from methods._layers import normal
from torch import Tensor, nn

from rankfold.weights import Projected, Weight

PATHS = ("0", "2", "4")


def perceptron(widths: tuple[int, ...] = (6, 9, 7, 5)) -> nn.Sequential:
    """Return three layers of weights, with the same values every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())][:-1]).double()


INPUTS, WANTED = normal(20, 6), normal(20, 5, seed=1)


def projection_of(model: nn.Module) -> Weight:
    """Return P."""
    leaf = next(leaf for leaf in model[0].expression.leaves() if isinstance(leaf, Projected))
    return leaf.projection.matrix


def weights_of(model: nn.Module) -> Tensor:
    """Return the adapted weights as one vector, as training has made them."""
    matrices = [model.get_submodule(path) for path in PATHS]
    return torch.cat(
        [(m.expression.dense() if hasattr(m, "expression") else m.weight).flatten() for m in matrices]
    )


def loss_of(model: nn.Module) -> Tensor:
    """Return the squared error on the made-up task."""
    return F.mse_loss(model(INPUTS), WANTED)


def train(model: nn.Module, steps: int, optimizer: Any = None) -> torch.optim.Optimizer:
    """Take steps of gradient descent, or of an optimizer that was made before, and return the optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(trained, lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return optimizer
