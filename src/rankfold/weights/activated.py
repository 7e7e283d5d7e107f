"""A product of two factors with a nonlinearity between them, which is no linear map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from ..errors import NotDense
from .weight import Leaf, Weight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class Activated(Weight):
    """`x -> scale up f(down x + shift)`: through r channels with an activation on them.

    Args:
        up: leaf (out, r).
        down: leaf (r, in).
        activation: f by its name in `ACTIVATIONS`.
        scale: multiplies the r channels, where that is the least.
        shift: leaf (r,), added before the activation, or None.
    """

    by_token = True

    def __init__(
        self, up: Leaf, down: Leaf, activation: str, scale: float = 1.0, shift: Leaf | None = None
    ) -> None:
        super().__init__((up.shape[0], down.shape[1]))
        self.up, self.down, self.shift = up, down, shift
        self.activation, self.scale = activation, scale

    def dense(self) -> Tensor:
        """Refuse.

        Raises:
            NotDense: always; it is no linear map.
        """
        raise NotDense(
            f"{self.formula()} has {self.activation} between its factors and no dense matrix: it cannot be "
            "folded"
        )

    def map(self, x: Tensor) -> Tensor:
        """Apply the factors, the activation between them: x (..., in) to (..., out)."""
        shift = None if self.shift is None else self.shift.tensor().to(x.dtype)
        inner = ACTIVATIONS[self.activation](F.linear(x, self.down.tensor().to(x.dtype), shift))
        return F.linear(inner * self.scale, self.up.tensor().to(inner.dtype))

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the trained factors."""
        both = ((self.up, "output"), (self.down, "input"))
        yield from ((leaf, side) for leaf, side in both if leaf.trainable)

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the factor that meets the input."""
        yield from self.down.entries()

    def macs(self, tokens: int) -> int:
        """Return the sum over both factors."""
        return tokens * (math.prod(self.up.shape) + math.prod(self.down.shape))

    def formula(self) -> str:
        """Return the factors around the activation."""
        scale = "" if self.scale == 1 else f"{self.scale:g} "
        shift = "" if self.shift is None else f" + {self.shift.formula()}"
        return f"{scale}{self.up.formula()} {self.activation}({self.down.formula()} x{shift})"
