"""Expressions whose rows, or columns, are brought to a trained length."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .composites import Composite
from .kernels import at_least_float32, forms, normalized_linear, safe_ratio, scaled_low_rank
from .op import LINEAR, Op, autocast_dtype
from .sums import Split, Sum
from .weight import Leaf, Pair, Weight, inference


class Normalized(Composite[tuple[Split, Tensor]]):
    """`diag(m / n) V`: every row of the direction V brought to a trained length m.

    The norm n is expanded over the factors of V = W + B A, so that the product is never formed:
    `n^2 = ||W||^2 + 2 <W, B A> + ||B A||^2`, row by row. It is a constant for autograd unless
    `detach=False`. A row of V that is exactly zero stays zero.

    Args:
        direction: expression (out, in).
        magnitude: leaf (out,).
        detach: whether the norm is left out of the gradient.
    """

    def __init__(self, direction: Weight, magnitude: Leaf, *, detach: bool = True) -> None:
        super().__init__(direction.shape)
        self.direction, self.magnitude, self.detach = direction, magnitude, detach

    def _split(self) -> Split:
        direction = self.direction
        if isinstance(direction, Sum):
            return direction.derived()
        return Split(others=[direction])

    def norm(self) -> Tensor:
        """Return the row norms of the direction, (out,), in float32 or better."""
        split = self._split()
        if split.base is None or split.others:
            dense = self.direction.dense()
            norms: Tensor = torch.linalg.vector_norm(dense, dim=1, dtype=at_least_float32(dense))
            return norms
        return row_norms(split.base, split.pair())

    def length(self) -> Tensor:
        """Return the row norms as the gradient is to see them: constants, unless `detach=False`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            return self.norm()

    def ratio(self) -> Tensor:
        """Return m / n, (out,); zero where the direction's row is zero."""
        return safe_ratio(self.magnitude.tensor(), self.length())

    def derived(self) -> tuple[Split, Tensor]:
        """Return the direction taken apart, and m / n."""
        return self._split(), self.ratio()

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.ratio()[:, None] * self.direction.dense()

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the direction and scale every output channel."""
        if inference():
            split, ratio = self.keep()
            pair = split.pair()
            if op is LINEAR and split.base is not None and pair is not None and not split.others:
                return scaled_low_rank(x, split.base, bias, pair[0], pair[1], ratio)
            return op.add(op.scale(self._unbiased(x, op), ratio.to(x.dtype)), bias)
        split = self._split()
        if op is not LINEAR or split.base is None or split.trained is None or split.others:
            return op.add(op.scale(self._unbiased(x, op), self.ratio().to(x.dtype)), bias)
        own = self.detach and forms(x, split.base.shape, autocast_dtype(x))
        norm = None if own else self.length()
        magnitude = self.magnitude.tensor()
        return normalized_linear(x, split.base, bias, split.trained, split.frozen, magnitude, norm)

    map = forward

    def _unbiased(self, x: Tensor, op: Op) -> Tensor:
        y: Tensor = self.direction(x, op=op)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the direction at their lengths."""
        return self.ratio()[ids][..., None] * self.direction.rows(ids)

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the pairs of the direction; gradients on them are those of the direction."""
        yield from self.direction.pairs(scale)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the two-sided leaves of the direction."""
        yield from self.direction.sides()

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the leaves of the direction that meet the input."""
        yield from self.direction.entries()

    def macs(self, tokens: int) -> int:
        """Return the direction's multiply-adds, those of the norm and the scaling."""
        return self.direction.macs(tokens) + self._norm_macs() + tokens * self.shape[0]

    def _norm_macs(self) -> int:
        split = self._split()
        rank = 0 if split.pair() is None else split.pair()[0].shape[1]  # type: ignore[index]
        return math.prod(self.shape) * (1 + rank)

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return self.direction.dense_macs() + self._norm_macs() + math.prod(self.shape)

    def formula(self) -> str:
        """Return normalize(direction) scaled by m."""
        return f"{self.magnitude.formula()} normalize({self.direction.formula()})"


class ColumnNormalized(Normalized):
    """`V diag(m / n)`: every column of the direction V brought to a trained length m.

    This is the normalised form of an embedding, whose outputs are its columns; m and n are (in,).
    """

    def norm(self) -> Tensor:
        """Return the column norms of the direction, (in,), in float32 or better."""
        split = self._split()
        if split.base is None or split.others:
            dense = self.direction.dense()
            norms: Tensor = torch.linalg.vector_norm(dense, dim=0, dtype=at_least_float32(dense))
            return norms
        pair = split.pair()
        return row_norms(split.base.T, None if pair is None else (pair[1].T, pair[0].T))

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.direction.dense() * self.ratio()

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Scale every input channel and apply the direction."""
        if op is not LINEAR:
            return op.apply(x, self.dense().to(x.dtype), bias)
        y: Tensor = self.direction(x * self.keep()[1].to(x.dtype), bias)
        return y

    map = forward

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the direction, their entries scaled."""
        return self.direction.rows(ids) * self.keep()[1]

    def formula(self) -> str:
        """Return normalize_columns(direction) scaled by m."""
        return f"normalize_columns({self.direction.formula()}) {self.magnitude.formula()}"


def row_norms(base: Tensor, pair: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the row norms of `base + up @ down` without forming the product.

    Args:
        base: (out, in), of any floating dtype; it is not copied to float32.
        pair: up (out, r) and down (r, in), or None.
    """
    dtype = at_least_float32(base)
    square: Tensor = torch.linalg.vector_norm(base, dim=1, dtype=dtype).square()
    if pair is None:
        return square.sqrt()
    up, down = (t.to(dtype) for t in pair)
    cross = (base @ down.T.to(base.dtype)).to(dtype)
    return (square + (up * (2 * cross + up @ (down @ down.T))).sum(1)).clamp_min(0).sqrt()
