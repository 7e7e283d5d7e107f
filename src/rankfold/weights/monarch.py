"""Monarch: two block-diagonal maps with a stride permutation between them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ..linalg import monarch_dense
from .blockwise import block_diagonal
from .weight import Leaf, Weight


class Monarch(Weight):
    """`P^T blockdiag(L) P blockdiag(R)`, cropped to (out, in); its blocks are matrices of low rank.

        z[kappa q + j] = (R_kappa x_kappa)_j,   z re-read as (t, l) and transposed,
        y[sigma l + lambda] = (L_lambda z_lambda)_sigma

    Args:
        left: leaf (l, s, t) with l s >= out.
        right: leaf (k, q, p) with k p >= in and k q = l t.
        shape: (out, in).
    """

    def __init__(self, left: Leaf, right: Leaf, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        if left.shape[0] * left.shape[2] != right.shape[0] * right.shape[1]:
            raise ValueError(f"cannot multiply {left.formula()} by {right.formula()}: the sizes do not meet")
        self.left, self.right = left, right

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        whole = monarch_dense(self.left.tensor(), self.right.tensor())
        return whole[: self.shape[0], : self.shape[1]]

    def map(self, x: Tensor) -> Tensor:
        """Apply two batches of blocks, with a transposition after each."""
        blocks, rows, inner = self.left.shape
        z = block_diagonal(x, self.right.tensor(), blocks * inner)
        z = z.unflatten(-1, (inner, blocks)).mT.flatten(-2)
        y = block_diagonal(z, self.left.tensor(), blocks * rows)
        cropped: Tensor = y.unflatten(-1, (blocks, rows)).mT.flatten(-2)[..., : self.shape[0]]
        return cropped

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the trained ones of the two leaves."""
        ends = ((self.left, "output"), (self.right, "input"))
        yield from ((leaf, side) for leaf, side in ends if leaf.trainable)

    def macs(self, tokens: int) -> int:
        """Return tokens * numbers in the two leaves."""
        return tokens * (math.prod(self.left.shape) + math.prod(self.right.shape))

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming every block."""
        return math.prod(self.left.shape) * self.right.shape[2]

    def formula(self) -> str:
        """Return monarch(left, right) with shapes."""
        return f"monarch({self.left.formula()} @ {self.right.formula()})"
