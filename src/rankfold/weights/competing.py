"""Matrices of distances between rows of two thin factors, of which only the largest entries count.

Neither the matrix nor anything of its size is kept for backward, and no index of an entry is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .composites import Composite, Dropped
from .kernels import applied, at_least_float32
from .materialise import materialised_linear
from .op import LINEAR, Op
from .weight import Leaf, inference, substituted

HEADS = 2
SHRINKS = ("magnitude", "soft", "hard")
_COEFFICIENT = 0.1


class _Contrast(torch.autograd.Function):
    """D[i, j] = ||first[0, i] - second[0, j]|| - ||first[1, i] - second[1, j]||.

    The gradient of a distance is zero where it is zero. Differences of distances are not for half precision,
    so autocast is left out of it.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            distance = torch.cdist(first, second)
        ctx.save_for_backward(first, second, distance)
        return distance[0] - distance[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        first, second, distance = ctx.saved_tensors
        if torch.compiler.is_compiling() or not distance.amin():
            distance = torch.where(distance == 0, torch.inf, distance)
        pull, sign = grad / distance, grad.new_tensor([1, -1])[:, None, None]
        with torch.autocast(grad.device.type, enabled=False):
            return (
                sign * (pull.sum(2)[:, :, None] * first - pull @ second),
                sign * (pull.sum(1)[:, :, None] * second - pull.mT @ first),
            )


class _FormedAgain(torch.autograd.Function):
    """The matrix of an expression, of which only the leaves are kept."""

    @staticmethod
    def forward(ctx: Any, expression: Competing, leaves: list[Leaf], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.expression, ctx.leaves = expression, leaves
        return expression.formed()

    @staticmethod
    @once_differentiable  # the matrix is formed again under a graph of its own
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        wanted = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needs, strict=True)]
        with torch.enable_grad(), substituted(ctx.leaves, wanted):
            matrix = ctx.expression.formed()
        found = iter(torch.autograd.grad(matrix, [t for t in wanted if t.requires_grad], grad))
        return (None, None, *(next(found) if need else None for need in needs))


class Competing(Composite[Tensor]):
    """The largest entries of a kernel matrix, all others zero.

        D = 0.1 (||O_0i - P_0j|| - ||O_1i - P_1j||),   K = D   or   D + a softmax_i(D / g) + b
        magnitude: K |K|,   soft: sign(K) (|K| - t),   hard: K,   on the entries that are kept

    t is the largest magnitude of a zeroed entry; it, and in `magnitude` the factor |K|, are constants to
    autograd. Of equal magnitudes the earlier entries are kept, so exactly as many are kept as were asked for.

    Args:
        output: leaf O (2, out, q).
        inputs: leaf P (2, in, q).
        kept: how many entries are kept, 1..out * in: a number, or a leaf (1,) of integers.
        shrink: what an entry that is kept is worth.
        mixing: leaves a, g and b of shape (1,), or nothing for K = D.
    """

    detach = True  # whether |K| is a constant to autograd where it is a factor
    mixing: Sequence[Leaf]

    def __init__(
        self,
        output: Leaf,
        inputs: Leaf,
        kept: int | Leaf,
        *,
        shrink: str = "magnitude",
        mixing: Sequence[Leaf] = (),
    ) -> None:
        super().__init__((output.shape[1], inputs.shape[1]))
        self.output, self.inputs, self.kept, self.shrink = output, inputs, kept, shrink
        self.mixing = torch.nn.ModuleList(mixing)  # type: ignore[assignment]  # a registered sequence

    def kernel(self) -> Tensor:
        """Return K (out, in), in float32 or better."""
        first, second = self.output.tensor(), self.inputs.tensor()
        dtype = at_least_float32(first)
        distance = applied(_Contrast, _COEFFICIENT * first.to(dtype), _COEFFICIENT * second.to(dtype))
        if not self.mixing:
            return distance
        scale, width, shift = (leaf.tensor().to(dtype) for leaf in self.mixing)
        return distance + scale * torch.softmax(distance / width, 0) + shift

    def formed(self) -> Tensor:
        """Return the matrix by ordinary autograd."""
        kernel = self.kernel()
        count = self.kept.tensor() if isinstance(self.kept, Leaf) else self.kept
        kept, threshold = largest(kernel.detach().abs(), count)
        if self.shrink == "magnitude":
            return kernel * (kept if self.detach else torch.where(kept > 0, kernel.abs(), 0))
        rest = kernel if self.shrink == "hard" else kernel - kernel.detach().sign() * threshold
        return torch.where(kept > 0, rest, 0)

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        leaves = [
            leaf for leaf in (self.output, self.inputs, *self.mixing, self.kept) if isinstance(leaf, Leaf)
        ]
        forming = any(leaf.substitute is not None for leaf in leaves)  # within a backward
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or forming:
            return self.formed()
        self.forget()
        return applied(_FormedAgain, self, leaves, *(leaf.tensor() for leaf in leaves))

    def derived(self) -> Tensor:
        """Return the matrix."""
        return self.formed()

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the matrix, formed again in backward; without gradients it is kept from call to call."""
        if op is not LINEAR:
            return op.add(op.apply(x, self.dense().to(x.dtype)), bias)
        if inference():
            return F.linear(x, self.keep().to(x.dtype), bias)
        return materialised_linear(self, x, bias)

    map = forward

    def macs(self, tokens: int) -> int:
        """Return those of one matrix, and of forming it where it is not kept."""
        return super().macs(tokens) + (0 if inference() else self.dense_macs())

    def dense_macs(self) -> int:
        """Return the multiply-adds of the distances and of what is made of them."""
        return self.shape[0] * self.shape[1] * (HEADS * self.output.shape[2] + 4)

    def formula(self) -> str:
        """Return largest(kernel) with shapes."""
        leaves = ", ".join(leaf.formula() for leaf in (self.output, self.inputs, *self.mixing))
        return f"largest({leaves})"


def largest(values: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the values with all but the largest set to zero, and the largest of those.

    Of equal values the earlier ones are kept. There is no limit to their number.

    Args:
        values: of any shape, at least 0.
        count: how many are kept, 1 or more; a tensor (1,) will do.

    Example:
        >>> kept, threshold = largest(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), 2)
        >>> kept.tolist(), threshold.item()
        ([[3.0, 0.0], [2.0, 0.0]], 2.0)
    """
    flat = values.flatten()
    if torch.compiler.is_compiling():  # no number may be read off a tensor
        order = flat.argsort(descending=True, stable=True)
        first = torch.arange(len(flat), device=flat.device) < count
        mask = torch.zeros_like(first).scatter(0, order, first)
        return torch.where(mask, flat, 0).view(values.shape), torch.where(mask, 0, flat).max()
    count = int(count)
    if count >= len(flat):
        return values, flat.new_zeros(())
    threshold, ties = _cut(flat, count)
    level = threshold.item()
    kept = F.threshold(flat, level, 0.0)
    if ties and level:
        kept[(flat == threshold).nonzero().flatten()[:ties]] = level
    return kept.view(values.shape), threshold


def _cut(flat: Tensor, count: int) -> tuple[Tensor, int]:
    """Return the largest value that is not among the `count` largest, and how many of those equal it."""
    position = len(flat) - count
    if flat.device.type != "cpu":
        threshold = flat.kthvalue(position).values
        return threshold, count - int(torch.count_nonzero(flat > threshold))
    parted = np.partition(flat.numpy(), position - 1)  # several times as fast as torch's selection
    level = parted[position - 1]
    return flat.new_tensor(level), int(np.count_nonzero(parted[position:] == level))


class DroppedPath(Dropped):
    """An expression that is left out of whole samples while training, and scaled up in the others."""

    def _thinned(self, x: Tensor, op: Op) -> Tensor:
        samples = x.new_ones(x.shape[:1] + (1,) * (x.dim() - 1)) if x.dim() > 1 else x.new_ones(1)
        return x * F.dropout(samples, self.probability, self.training)
