"""A matrix that is zero but for a few whole columns, chosen once and stored."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from .weight import Leaf, Weight


class Channels(Weight):
    """Some columns of a matrix, `matrix[:, index] = scale values`; it reads those channels only.

    Args:
        values: leaf (out, k).
        index: integer leaf (k,), no position twice.
        width: in, the number of columns of the matrix.
        scale: multiplies the k channels that it reads.
    """

    def __init__(self, values: Leaf, index: Leaf, width: int, scale: float = 1.0) -> None:
        super().__init__((values.shape[0], width))
        self.values, self.index, self.scale = values, index, scale

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        values = self.values.tensor() * self.scale
        return values.new_zeros(self.shape).index_copy(1, self.index.tensor().long(), values)

    def map(self, x: Tensor) -> Tensor:
        """Apply the columns to their channels: k multiply-adds for an output; x[..., index] is kept."""
        read = x.index_select(-1, self.index.tensor()) * self.scale
        return F.linear(read, self.values.tensor().to(x.dtype))

    def macs(self, tokens: int) -> int:
        """Return tokens * out * k."""
        return tokens * math.prod(self.values.shape)

    def dense_macs(self) -> int:
        """Return the number of entries."""
        return math.prod(self.values.shape)

    def formula(self) -> str:
        """Return the values, their positions and the shape."""
        size = "x".join(map(str, self.shape))
        scale = "" if self.scale == 1 else f"{self.scale:g} "
        return f"{scale}channels({self.values.formula()} at {self.index.formula()}, {size})"
