"""The gradient of an array that all weights are read from, divided slot by slot by its load (STABLE-RPS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..weights import Hashed
from .rules import Dynamics
from .run import Run

MODES = ("v1", "v2", "v3", "v4", "v5", "none")


@dataclass(kw_only=True)
class GradientScaler(Dynamics):
    """The division of the gradient of z; its option is that of `stable-rps`.

    Args:
        scaler: "v1" to "v5", or "none".
    """

    scaler: str

    @property
    def idle(self) -> bool:
        """Whether the gradient is left alone."""
        return self.scaler == "none"

    def gradients_ready(self, run: Run) -> None:
        """Divide the gradient of z."""
        leaves = [leaf for leaf in run.expressions.values() if isinstance(leaf, Hashed)]
        grad = leaves[0].pool().grad
        if grad is not None:
            grad /= 1e-6 + gamma(leaves, self.scaler).to(grad)


def gamma(leaves: Sequence[Hashed], mode: str) -> Tensor:
    """Return Gamma (m,) of weights that read one array.

    Args:
        leaves: the weights.
        mode: "v1" to "v5".
    """
    total = first = second = leaves[0].scale.tensor().new_zeros(leaves[0].chunks.size)
    for leaf in leaves:
        counts, scale = leaf.loads(), leaf.scale.tensor()
        total, first, second = total + counts, first + counts * scale, second + counts * scale.square()
    if mode == "v1":
        return first.square() / (1e-3 + total)
    divisors: dict[str, Tensor] = {
        "v2": first, "v3": first / total.clamp(min=1), "v4": second.sqrt(), "v5": second,
    }  # fmt: skip
    return divisors[mode]
