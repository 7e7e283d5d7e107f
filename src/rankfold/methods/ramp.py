"""A change that is let in over the first steps of training."""

from __future__ import annotations

from dataclasses import dataclass

from ..weights import Dense
from .rules import Dynamics
from .run import Run


@dataclass(kw_only=True)
class Ramp(Dynamics):
    """The growth of u, which is 1 after `ramp` steps."""

    ramp: int = 1000

    def stepped(self, run: Run) -> None:
        """Set u to what the next step is to see."""
        for expression in run.expressions.values():
            for leaf in expression.leaves():
                if isinstance(leaf, Dense) and leaf.name == "ramp":
                    leaf.value.fill_(min((run.step + 1) / self.ramp, 1.0))
