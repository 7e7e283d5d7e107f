"""The product of one matrix with its own transpose."""

from __future__ import annotations

import math

from torch import Tensor

from .op import LINEAR, Op
from .weight import Leaf, Weight


class Gram(Weight):
    """One factor against itself, `A[:out] A[:in]^T`: symmetric and positive semi-definite where out = in.

    Args:
        factor: leaf (max(out, in), r).
        shape: (out, in).
    """

    def __init__(self, factor: Leaf, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.inner = factor

    def factored(self) -> tuple[Tensor, Tensor]:
        """Return the leading rows as `up`, and as `down` transposed."""
        factor = self.inner.tensor()
        return factor[: self.shape[0]], factor[: self.shape[1]].T

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        up, down = self.factored()
        return up @ down

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the two factors, one after the other."""
        return op.add(op.low_rank(x, *(t.to(x.dtype) for t in self.factored())), bias)

    map = forward

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the left factor, taken through the right one."""
        up, down = self.factored()
        return up[ids] @ down

    def small_rank(self) -> int:
        """Return the rank of the small form."""
        return self.inner.shape[1]

    def macs(self, tokens: int) -> int:
        """Return tokens * r (out + in)."""
        return tokens * self.inner.shape[1] * sum(self.shape)

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return math.prod(self.shape) * self.inner.shape[1]

    @property
    def T(self) -> Weight:
        """The same factor, with the sides exchanged."""
        return Gram(self.inner, (self.shape[1], self.shape[0]))

    def formula(self) -> str:
        """Return gram(A) with shapes."""
        return f"gram({self.inner.formula()}, {self.shape[0]}x{self.shape[1]})"
