"""Trained products whose factors become sparse during training, term by term (RoseLoRA)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .limits import in_range, leave_steps
from .rules import Dynamics
from .run import Run, TrainedPair
from .sensitivity import sensitivity, window

GONE = -torch.inf  # the importance of an entry that has been pruned


@dataclass(kw_only=True)
class SparseRows(Dynamics):
    """The pruning; its options are those of `roselora`.

    Args:
        keep: share of every row of A and column of B that is kept in the end, in (0, 1].
        warmup, final: shares of the training before the first and after the last pruning, in [0, 1).
        beta: of the average of importances, in [0, 1).
        clamp: largest magnitude of a value after pruning, or None.
    """

    keep: float
    warmup: float
    final: float
    beta: float
    clamp: float | None
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)

    def __post_init__(self) -> None:
        in_range("roselora", "(0, 1]", keep=self.keep)
        in_range("roselora", "[0, 1)", beta=self.beta)
        in_range("roselora", "(0, inf)", clamp=self.clamp)
        leave_steps("roselora", warmup=self.warmup, final=self.final)

    def gradients_ready(self, run: Run) -> None:
        """Let the importance of every entry follow, terms first: (r, out) and (r, in)."""
        for pair in run.pairs:
            memory = run.memory(pair.key)
            for name, rows in _rows(pair).items():
                new, old = _importance(pair, name), memory.get(name)
                if old is not None and old.shape == rows.shape:
                    new = torch.where(old == GONE, GONE, self.beta * old + (1 - self.beta) * new)
                memory[name] = new

    def stepped(self, run: Run) -> None:
        """Prune every row of A and column of B."""
        share = self.share(run)
        for pair in run.pairs if share < 1 else ():
            for name, rows in _rows(pair).items():
                prune(rows, run.memory(pair.key), name, share)
                if self.clamp is not None:
                    rows.clamp_(-self.clamp, self.clamp)

    def share(self, run: Run) -> float:
        """Return tau(t)."""
        begin, end = window(run.total_steps, self.warmup, self.final)
        begin = max(1, begin)
        left = 1 - (run.step - begin) / max(1, end - begin)
        return self.keep + (1 - self.keep) * min(1.0, max(0.0, left)) ** 3


def _rows(pair: TrainedPair) -> dict[str, Tensor]:
    """Return the values of the columns of B and the rows of A, one per term."""
    return {"up": pair.up.detach().T, "down": pair.down.detach()}


def _importance(pair: TrainedPair, name: str) -> Tensor:
    return sensitivity(pair.up).T if name == "up" else sensitivity(pair.down)


def prune(rows: Tensor, memory: dict[str, Tensor], name: str, share: float) -> None:
    """Set all but the most important share of every row to zero, for good.

    Args:
        rows: (r, n), changed in place.
        memory: holds the importance (r, n) by name.
        name: in it.
        share: that is kept of every row, rounded up.
    """
    importance = memory.get(name)
    if importance is None or importance.shape != rows.shape:  # terms that are new
        return
    count = rows.shape[1] - math.ceil(round(share * rows.shape[1], 9))
    least = importance.argsort(dim=1, stable=True)[:, :count]
    pruned = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, least, True)
    memory[name] = importance.masked_fill(pruned, GONE)
    rows.masked_fill_(pruned, 0)
