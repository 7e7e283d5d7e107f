"""The norms of what is added to a core in a frozen singular basis, as a regulariser (SALT)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import require
from ..weights import Weight
from .limits import in_range
from .rules import Dynamics
from .run import Run
from .sensitivity import add_slope


@dataclass(kw_only=True)
class Penalty(Dynamics):
    """The regulariser in training.

    Args:
        mu: its weight, at least 0.
    """

    mu: float

    def __post_init__(self) -> None:
        in_range("salt", "[0, inf)", mu=self.mu)

    @property
    def idle(self) -> bool:
        """Whether there is none."""
        return self.mu == 0

    def gradients_ready(self, run: Run) -> None:
        """Add the gradient of mu times the penalty to that of the loss."""
        for expression in run.expressions.values():
            trained = [leaf.tensor() for leaf in expression.leaves() if leaf.stored and leaf.trainable]
            with torch.enable_grad():
                slopes = torch.autograd.grad(self.mu * sum(_norms(expression), torch.zeros(())), trained)
            for parameter, slope in zip(trained, slopes, strict=True):
                add_slope(parameter, slope)


def penalty(model: nn.Module, name: str = "default") -> Tensor:
    """Return the sum over weights of ||diag(a S_r + b)||_F + ||X Y||_F, to be added to the loss times mu."""
    norms = [norm for each in require(model).expressions(name).values() for norm in _norms(each)]
    return torch.stack(norms).sum()


def _norms(expression: Weight) -> Iterator[Tensor]:
    """Yield the norms of what is added to the two parts of the core, before the rectifier."""
    leaves = {leaf.name: leaf.tensor() for leaf in expression.leaves()}
    yield (leaves["scale"] * leaves["values"] + leaves["shift"]).norm()
    if "up" in leaves:
        yield (leaves["up"] @ leaves["down"]).norm()
