"""A kernel of two window axes as a vertical convolution and a horizontal one."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .op import LINEAR, Convolution, Op
from .weight import Leaf, Weight


class Separable(Weight):
    """`W[o, (c, i, j)] = sum_q H[o, (q, j)] V[q, (c, i)]`, a kernel (h, w) applied as (h, 1), then (1, w).

    Args:
        vertical: leaf V (q, in / groups * h).
        horizontal: leaf H (out, q * w).
        window: (h, w).
    """

    def __init__(self, vertical: Leaf, horizontal: Leaf, window: tuple[int, ...]) -> None:
        super().__init__((horizontal.shape[0], vertical.shape[1] * window[1]))
        self.vertical, self.horizontal, self.window = vertical, horizontal, tuple(window)

    def dense(self) -> Tensor:
        """Return the matrix, (out, in / groups * h * w)."""
        height, width = self.window
        vertical = self.vertical.tensor().unflatten(1, (-1, height))
        horizontal = self.horizontal.tensor().unflatten(1, (-1, width))
        return torch.einsum("oqj,qci->ocij", horizontal, vertical).flatten(1)

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Convolve down the columns, then along the rows; within each group where there are groups."""
        if not isinstance(op, Convolution):
            return super().forward(x, bias, op)
        vertical = self.vertical.tensor().to(x.dtype).repeat(op.groups, 1)
        inner = _along(op, 0).apply(x, vertical)
        return op.add(_along(op, 1).apply(inner, self.horizontal.tensor().to(x.dtype)), bias)

    def macs(self, tokens: int) -> int:
        """Return tokens * numbers in the two leaves."""
        return tokens * (math.prod(self.vertical.shape) + math.prod(self.horizontal.shape))

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return math.prod(self.shape) * self.vertical.shape[0]

    def formula(self) -> str:
        """Return separable(horizontal @ vertical) with shapes."""
        return f"separable({self.horizontal.formula()} @ {self.vertical.formula()})"


def _along(op: Convolution, axis: int) -> Convolution:
    """Return the part of a convolution that acts along one of its two axes."""

    def only(values: tuple[int, ...], other: int) -> tuple[int, ...]:
        return (values[0], other) if axis == 0 else (other, values[1])

    padding = op.padding if isinstance(op.padding, str) else only(op.padding, 0)
    flat = op.flat_padding and ((0, 0, *op.flat_padding[2:]) if axis == 0 else (*op.flat_padding[:2], 0, 0))
    return replace(
        op,
        window=only(op.window, 1),
        stride=only(op.stride, 1),
        dilation=only(op.dilation, 1),
        padding=padding,
        flat_padding=flat,
    )
