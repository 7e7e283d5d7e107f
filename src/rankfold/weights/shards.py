"""Maps that cut a weight into shards: one shard repeated, and blocks that multiply its own shards."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .leaves import Base
from .thin import inner_linear, shard_sum, tiled
from .weight import Leaf, Weight


class Repeated(Weight):
    """One shard (out, r) beside itself until the columns are filled, the last one cut: `D [I_r I_r ...]`.

    Applied by adding the input's shards first, so that r and not `in` channels are multiplied.

    Args:
        shard: leaf (out, r).
        columns: in.
    """

    def __init__(self, shard: Leaf, columns: int) -> None:
        super().__init__((shard.shape[0], columns))
        self.shard = shard

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return tiled(self.shard.tensor(), self.shape[1])

    def map(self, x: Tensor) -> Tensor:
        """Add the shards of the input, then multiply."""
        return F.linear(shard_sum(x, self.shard.shape[1]), self.shard.tensor().to(x.dtype))

    def added(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x @ (base + matrix).T + bias`, keeping the shards' sum for backward and not x."""
        return inner_linear(x, base, bias, self.shard.tensor())

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the shard, repeated."""
        return tiled(self.shard.rows(ids), self.shape[1])

    def macs(self, tokens: int) -> int:
        """Return tokens * numbers in the shard; adding multiplies nothing."""
        return tokens * math.prod(self.shard.shape)

    def formula(self) -> str:
        """Return repeat(shard) with the shape."""
        return f"repeat({self.shard.formula()}, {self.shape[0]}x{self.shape[1]})"


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
