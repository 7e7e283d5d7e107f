"""Maps that see a convolution's kernel as more than a matrix: under another shape, or mode by mode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .op import LINEAR, Convolution, Op
from .weight import Leaf, Pair, Weight


class Viewed(Weight):
    """The numbers of a matrix, row after row, in another shape: `inner.reshape(out, in)`.

    A pair inside is not a term of the weight: its product has another shape than the weight's gradient.

    Args:
        inner: expression of as many entries.
        shape: (out, in).
    """

    def __init__(self, inner: Weight, shape: tuple[int, int]) -> None:
        if math.prod(inner.shape) != math.prod(shape):
            raise ValueError(f"cannot view {inner.formula()} as {shape[0]}x{shape[1]}: the sizes differ")
        super().__init__(shape)
        self.inner = inner

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.inner.dense().reshape(self.shape)

    def small_rank(self) -> int | None:
        """Return the inner rank where the shape is the inner one; a view has another rank."""
        return self.inner.small_rank() if self.inner.shape == self.shape else None

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return the inner pair where the shape is the inner one."""
        return self.inner.factored() if self.inner.shape == self.shape else None

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the inner expression where the shape is its own, else the matrix."""
        if self.inner.shape == self.shape:
            y: Tensor = self.inner(x, bias, op)
            return y
        return op.apply(x, self.dense().to(x.dtype), bias)

    map = forward

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the inner pairs, which are parts and not terms."""
        for pair in self.inner.pairs(scale):
            yield replace(pair, additive=False)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the inner leaves."""
        yield from self.inner.sides()

    def macs(self, tokens: int) -> int:
        """Return the inner count, or that of forming and applying the matrix."""
        if self.inner.shape == self.shape:
            return self.inner.macs(tokens)
        return self.dense_macs() + tokens * math.prod(self.shape)

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the inner matrix."""
        return self.inner.dense_macs()

    def formula(self) -> str:
        """Return view(inner) with the shape."""
        return f"view({self.inner.formula()}, {self.shape[0]}x{self.shape[1]})"


class Polyadic(Weight):
    """A sum of R outer products over a kernel's modes: `sum_t out[o, t] in[i, t] window1[h, t] ...`.

    A convolution is applied as a 1x1 mix to R channels, one filter per channel and a 1x1 mix back.

    Args:
        factors: leaves (out, R), (in / groups, R) and one (size, R) per window axis.
    """

    factors: Sequence[Leaf]

    def __init__(self, factors: Sequence[Leaf]) -> None:
        super().__init__((factors[0].shape[0], math.prod(f.shape[0] for f in factors[1:])))
        self.rank = factors[0].shape[1]
        self.factors = nn.ModuleList(factors)  # type: ignore[assignment]  # a registered sequence

    def tensors(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return the factors transposed, (R, size) each, on request in another dtype."""
        return [factor.tensor().T.to(dtype) for factor in self.factors]

    def dense(self) -> Tensor:
        """Return the matrix, (out, in * window)."""
        up, *rest = self.tensors()
        return up.T @ _outer(rest)

    def small_rank(self) -> int | None:
        """Return R; None on a convolution, where a single pair would forget that the filters separate."""
        return self.rank if len(self.factors) == 2 else None

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return the two factors of a matrix."""
        if self.small_rank() is None:
            return None
        up, down = self.tensors()
        return up.T, down

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Mix to R channels, filter each by itself, mix back; within each group where there are groups."""
        up, channels, *windows = self.tensors(x.dtype)
        if not isinstance(op, Convolution):
            return op.add(op.low_rank(x, up.T, _outer([channels, *windows])), bias)
        inner = op.pointwise(x, channels.repeat(op.groups, 1))
        each = replace(op, groups=op.groups * self.rank)
        inner = each.apply(inner, _outer(windows).repeat(op.groups, 1))
        return op.add(op.pointwise(inner, up.T), bias)

    map = forward

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the trained ones of the two channel factors."""
        ends = zip(list(self.factors)[:2], ("output", "input"), strict=True)
        yield from ((leaf, side) for leaf, side in ends if leaf.trainable)

    def macs(self, tokens: int) -> int:
        """Return tokens * R * (in + window + out) on channels, without a window tokens * R * (in + out)."""
        out, channels, *windows = (factor.shape[0] for factor in self.factors)
        return tokens * self.rank * (out + channels + (math.prod(windows) if windows else 0))

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return math.prod(self.shape) * self.rank

    def formula(self) -> str:
        """Return polyadic(factors) with shapes."""
        return f"polyadic({', '.join(factor.formula() for factor in self.factors)})"


def _outer(factors: Sequence[Tensor]) -> Tensor:
    """Return the outer product of the factors' rows, row by row: (R, n), (R, m), ... to (R, n m ...)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None, :]).flatten(1)
    return product
