"""What an adapted model consists of, counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from .adaptation import Adaptation, adaptation_of, require
from .layer import StructuredLayer


@dataclass(frozen=True)
class Counts:
    """The numbers of a model, counted three ways.

    Attributes:
        stored: in a checkpoint of the model as it is, positions and other integers included.
        active: that have a gradient and moments in the optimizer.
        deployed: in what is served: of every adapted weight the smaller of its expression and its matrix, and
            everything else.
    """

    stored: int
    active: int
    deployed: int

    def __str__(self) -> str:
        """Return a line."""
        return f"{self.stored:,} stored, {self.active:,} active, {self.deployed:,} deployed"


def count(model: nn.Module) -> Counts:
    """Count the numbers of a model three ways: stored, active (trained) and deployed.

    Args:
        model: adapted or not; of an adapted one the active adapters count as deployed.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)), "sltrain", rank=4)
        >>> print(rf.count(model))
        756 stored, 634 active, 756 deployed
    """
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    parameters = list(model.parameters())
    stored = sum(t.numel() for t in tensors.values())
    adaptation = adaptation_of(model)
    saved = 0 if adaptation is None else sum(_saved(layer) for layer in adaptation.layers.values())
    return Counts(stored, sum(p.numel() for p in parameters if p.requires_grad), stored - saved)


def _saved(layer: StructuredLayer) -> int:
    """Return how many numbers fewer a layer is served with than it is stored with."""
    if layer.lender is not None:
        return 0
    here = {id(t): t for t in layer.adapters.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    stored = sum(t.numel() for t in here.values()) + (0 if layer.is_released else math.prod(layer.shape))
    expression = layer.expression
    if expression is None or not expression.has_matrix():
        return 0
    return max(0, stored - math.prod(layer.shape))


@dataclass(frozen=True)
class Row:
    """One adapted weight: its path, its formula, and how many numbers train in it."""

    path: str
    formula: str
    trainable: int


@dataclass(frozen=True)
class Summary:
    """Counts of an adapted model.

    Attributes:
        trainable: numbers that training moves; tensors shared between layers count once.
        total: numbers in the whole model, adapters included.
        rows: the weights of the active adapters.
        whole: names of the tensors trained whole beside them.
    """

    trainable: int
    total: int
    rows: tuple[Row, ...]
    whole: tuple[str, ...]

    @property
    def share(self) -> float:
        """Trained numbers over all numbers."""
        return self.trainable / max(1, self.total)

    def __str__(self) -> str:
        """Return a table, equal formulas folded into one line."""
        groups: dict[tuple[str, int], list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.formula, row.trainable), []).append(row.path)
        lines = [
            f"{len(paths):4d} x {formula}   ({count:,} trained each)"
            for (formula, count), paths in groups.items()
        ]
        if self.whole:
            lines.append(f"trained whole: {', '.join(self.whole)}")
        lines.append(f"trained {self.trainable:,} of {self.total:,} numbers ({100 * self.share:.3g} %)")
        return "\n".join(lines)


def _rows(adaptation: Adaptation) -> list[Row]:
    rows = []
    for name in adaptation.active:
        for path, expression in adaptation.expressions(name).items():
            rows.append(Row(path, expression.formula(), expression.count().trainable))
        for path, (branch, _) in adaptation.adapters[name].branches.items():
            count = sum(p.numel() for p in branch.parameters() if p.requires_grad)
            rows.append(Row(path, branch.formula(), count))
    return rows


def summary(model: nn.Module) -> Summary:
    """Count an adapted model; printing the result gives a table.

    Raises:
        NotAdapted: the model holds no adapter.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), "lora", rank=2)
        >>> print(rf.summary(model))
           1 x W0[4x8] + (up*[4x2] @ down*[2x8])   (24 trained each)
        trained 24 of 60 numbers (40 %)
    """
    adaptation = require(model)
    parameters = list(model.parameters())
    return Summary(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        rows=tuple(_rows(adaptation)),
        whole=tuple(key for name in adaptation.active for key in adaptation.adapters[name].values),
    )
