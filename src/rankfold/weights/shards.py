"""Maps that cut a weight into shards, which blocks multiply."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .leaves import Base
from .weight import Leaf, Weight


class Sharded(Weight):
    """What blocks make of a weight's shards: `(W0_ij + I) B_i` for the r x r shards W0_ij of a weight.

    Args:
        base: the weight, (out, in), of which r divides both sides.
        blocks: leaf (out / r, r, r).
    """

    def __init__(self, base: Base, blocks: Leaf) -> None:
        super().__init__(base.shape)
        self.base, self.blocks = base, blocks

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        blocks, base = self.blocks.tensor(), self.base.dense()
        count, rank, _ = blocks.shape
        shards = base.to(torch.promote_types(base.dtype, blocks.dtype)).reshape(count, -1, rank)
        change = torch.bmm(shards, blocks).view(count, rank, -1, rank) + blocks[:, :, None]
        return change.reshape(self.shape)

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return math.prod(self.shape) * self.blocks.shape[1] + self.base.dense_macs()

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds of forming the matrix and applying it."""
        return self.dense_macs() + super().macs(tokens)

    def formula(self) -> str:
        """Return (W0 + I) B by shards."""
        return f"shards(({self.base.formula()} + I) {self.blocks.formula()})"
