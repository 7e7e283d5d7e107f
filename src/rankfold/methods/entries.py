"""Entries of sparse changes that compete over all weights for a budget that falls during training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..linalg.shares import proportional
from ..weights import Dense
from ..weights.competing import Competing
from .limits import in_range, leave_steps
from .rules import Dynamics
from .run import Run
from .sensitivity import all_smoothed, cubic_budget, sensitivities, window


@dataclass(kw_only=True)
class SharedEntries(Dynamics):
    """The competition between weights.

    Args:
        initial, zeroed: share of zeroed entries at the beginning and in the end.
        warmup, final: shares of the training before the budget falls and after it has fallen, in [0, 1).
        interval: steps between two allocations, at least 1.
        beta1, beta2: of the averages, in [0, 1).
    """

    initial: float
    zeroed: float
    warmup: float
    final: float
    interval: int
    beta1: float
    beta2: float
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)

    def __post_init__(self) -> None:
        in_range("snella", "[0, 1)", initial=self.initial, zeroed=self.zeroed)
        in_range("snella", "[0, 1)", beta1=self.beta1, beta2=self.beta2)
        in_range("snella", "[1, inf)", interval=self.interval)
        leave_steps("snella", warmup=self.warmup, final=self.final)

    def gradients_ready(self, run: Run) -> None:
        """Remember the score of every weight."""
        parts = [
            (run.memory(path), leaf.name, leaf.tensor())
            for path, kernel in kernels(run).items()
            for leaf in (kernel.output, kernel.inputs)
        ]
        new = sensitivities([value for *_, value in parts])
        moving = [(memory, name, value) for (memory, name, _), value in zip(parts, new, strict=True)]
        scores = iter(all_smoothed(moving, self.beta1, self.beta2))
        for path, output, inputs in zip(kernels(run), scores, scores, strict=True):
            run.memory(path)["score"] = output.mean() + inputs.mean()

    def stepped(self, run: Run) -> None:
        """Share the budget out again."""
        end = window(run.total_steps, self.warmup, self.final)[1]
        if run.step <= end and (run.step == end or run.step % self.interval == 0):
            share_out(run, self.budget(run))

    def budget(self, run: Run) -> int:
        """Return V(t)."""
        entries = sum(math.prod(kernel.shape) for kernel in kernels(run).values())
        first, last = (round((1 - share) * entries) for share in (self.initial, self.zeroed))
        return cubic_budget(run.step, *window(run.total_steps, self.warmup, self.final), first, last)


def kernels(run: Run) -> dict[str, Competing]:
    """Return the kernel matrix of every weight by path."""
    return {
        path: next(part for part in expression.modules() if isinstance(part, Competing))
        for path, expression in run.expressions.items()
    }


def share_out(run: Run, budget: int) -> None:
    """Let every weight keep its share of a budget of entries, at least one."""
    held = kernels(run)
    scores = [float(run.memory(path)["score"]) for path in held]
    most = [math.prod(kernel.shape) for kernel in held.values()]
    for kernel, count in zip(
        held.values(), proportional(scores, max(budget, len(held)), minimum=1, maximum=most), strict=True
    ):
        assert isinstance(kernel.kept, Dense)
        kernel.kept.value.fill_(count)
