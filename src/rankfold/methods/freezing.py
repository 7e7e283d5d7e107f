"""Adaptive vector freezing: the vectors that have moved most rest for a while (VectorFit)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import InvalidOption
from .limits import in_range
from .rules import Dynamics
from .run import Run


@dataclass(kw_only=True)
class FrozenVectors(Dynamics):
    """The freezing; its options are those of `vectorfit`.

    Args:
        freeze: how many vectors are frozen at a time, at least 0 and not all.
        interval: steps between two choices, at least 1.
        warmup: share of the training before the first choice, in [0, 1).
        beta: of the average of strengths, in [0, 1).
    """

    freeze: int
    interval: int
    warmup: float
    beta: float
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)

    def __post_init__(self) -> None:
        in_range("vectorfit", "[0, inf)", freeze=self.freeze)
        in_range("vectorfit", "[1, inf)", interval=self.interval)
        in_range("vectorfit", "[0, 1)", warmup=self.warmup, beta=self.beta)

    @property
    def idle(self) -> bool:
        """Whether nothing is ever frozen."""
        return self.freeze == 0

    def check(self, run: Run) -> None:
        """Refuse to freeze all vectors at once."""
        held = len(vectors(run))
        if self.freeze >= held:
            raise InvalidOption(f"vectorfit: freeze must be below the {held} vectors, not {self.freeze}")

    def gradients_ready(self, run: Run) -> None:
        """Let the optimizer skip what is frozen: a gradient of zero would still move it by its momentum."""
        for key, vector in vectors(run).items():
            if run.memory(key).get("frozen"):
                vector.grad = None

    def stepped(self, run: Run) -> None:
        """Follow the strengths, and choose anew every `interval` steps."""
        strengths = {}
        for key, vector in vectors(run).items():
            memory, strength = run.memory(key), float(vector.detach().abs().mean())
            memory["strength"] = self.beta * memory.get("strength", 0.0) + (1 - self.beta) * strength
            strengths[key] = memory["strength"]
        assert run.total_steps is not None
        since = run.step - int(self.warmup * run.total_steps)
        if since >= 0 and since % self.interval == 0:
            strongest = sorted(strengths, key=lambda key: -strengths[key])[: self.freeze]
            for key in strengths:
                run.memory(key)["frozen"] = key in strongest


def vectors(run: Run) -> dict[str, Tensor]:
    """Return every trained vector, which all start at zero, by the path of its weight and its name."""
    return {
        f"{path}:{leaf.name}": leaf.tensor()
        for path, expression in run.expressions.items()
        for leaf in expression.leaves()
        if leaf.stored and leaf.trainable
    }
