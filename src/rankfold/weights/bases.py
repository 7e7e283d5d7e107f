"""Maps made of frozen random bases with trained coefficients, keeping as few numbers as they can."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .op import LINEAR
from .weight import Leaf, Weight


class ScaledBases(Weight):
    """A sum of scaled products of frozen bases, `sum_n B_n diag(l_n) A diag(g_n)`, or its transpose if wide.

    Args:
        up: frozen leaf (M, N, r), all B_n.
        down: frozen leaf (r, m), A.
        inner: leaf (N, r), the l_n.
        outer: leaf (N, m), the g_n.
        wide: return the transposed map, (m, M).
    """

    def __init__(self, up: Leaf, down: Leaf, inner: Leaf, outer: Leaf, *, wide: bool) -> None:
        sides = (up.shape[0], down.shape[1])
        super().__init__(sides[::-1] if wide else sides)
        self.up, self.down, self.inner, self.outer, self.wide = up, down, inner, outer, wide

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the two factors of the map, of rank N r."""
        leaves = (self.down, self.inner, self.outer)
        down: Tensor = _ScaledRows.apply(*(leaf.tensor() for leaf in leaves))  # type: ignore[no-untyped-call]
        up = self.up.tensor().flatten(1)
        return (down.T, up.T) if self.wide else (up, down)

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        up, down = self.ends()
        return up @ down

    def map(self, x: Tensor) -> Tensor:
        """Apply the two factors, one after the other."""
        return LINEAR.low_rank(x, *(end.to(x.dtype) for end in self.ends()))

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the left factor, taken through the right one."""
        up, down = self.ends()
        return up[ids] @ down

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the coefficients: the g_n stand on the smaller side, the l_n further in."""
        ends = (self.outer, self.inner) if self.wide else (self.inner, self.outer)
        yield from zip(ends, ("output", "input"), strict=True)

    def macs(self, tokens: int) -> int:
        """Return tokens * N r (out + in), and scaling the bases."""
        rank = math.prod(self.up.shape[1:])
        return tokens * rank * sum(self.shape) + 2 * rank * self.down.shape[1]

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return math.prod(self.up.shape) * self.down.shape[1]

    def formula(self) -> str:
        """Return bases(B, l, A, g) with shapes."""
        names = (self.up, self.inner, self.down, self.outer)
        return f"bases({', '.join(leaf.formula() for leaf in names)}){'^T' if self.wide else ''}"


class _ScaledRows(torch.autograd.Function):
    """Row (n, k) is `inner[n, k] down[k] . outer[n]`; only the arguments are kept for backward."""

    @staticmethod
    def forward(ctx: Any, down: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        ctx.save_for_backward(down, inner, outer)
        return ((inner[:, :, None] * down).mul_(outer[:, None])).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        down, inner, outer = ctx.saved_tensors
        met = gradient.view(*inner.shape, -1) * down
        return None, torch.einsum("nkj,nj->nk", met, outer), torch.einsum("nkj,nk->nj", met, inner)


class RandomMixture(Leaf):
    """A matrix mixed from random ones that are drawn again whenever they are met, and never kept.

        value = U_0 + sum_{i=1..k} c_i U_i,   U_i uniform on [-1, 1] / sqrt(k)

    Args:
        coefficients: leaf (k,).
        name: the method's own name for the result.
        shape: of the matrix.
        seed: of the private generator, on the CPU, so alike on every device.
        offset: U_0, which is not stored in files; None for zero.
    """

    stored = False
    offset: Tensor | None

    def __init__(
        self, coefficients: Leaf, name: str, shape: tuple[int, ...], seed: int, offset: Tensor | None = None
    ) -> None:
        super().__init__(name, shape)
        self.coefficients, self.seed = coefficients, seed
        self.register_buffer("offset", offset, persistent=False)

    @property
    def trainable(self) -> bool:
        """Whether the coefficients are trained."""
        return self.coefficients.trainable

    def source(self) -> Tensor:
        """Return the mixed matrix."""
        coefficients = self.coefficients.tensor()
        mixed: Tensor = _mixed(coefficients, list(self.shape), self.seed)
        return mixed if self.offset is None else mixed + self.offset


_TOGETHER = 1 << 20  # numbers drawn at a time


def _drawn(count: int, size: int, seed: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the basis in slices (n, size), always the same ones."""
    generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(count)
    step = max(1, _TOGETHER // max(1, size))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        drawn = torch.empty(part.stop - start, size).uniform_(-bound, bound, generator=generator)
        yield part, drawn.to(like.device, like.dtype)


# Operators of their own, because a compiler cannot look into a private generator. They are each other's
# adjoint, and sum in the dtype of what they are given, whatever autocast says.


@torch.library.custom_op("rankfold::mixed", mutates_args=())
def _mixed(coefficients: Tensor, shape: list[int], seed: int) -> Tensor:
    with torch.autocast(coefficients.device.type, enabled=False):
        total = coefficients.new_zeros(math.prod(shape))
        for part, drawn in _drawn(coefficients.shape[0], math.prod(shape), seed, coefficients):
            total += coefficients[part] @ drawn
        return total.view(shape)


@torch.library.custom_op("rankfold::unmixed", mutates_args=())
def _unmixed(matrix: Tensor, count: int, seed: int) -> Tensor:
    with torch.autocast(matrix.device.type, enabled=False):
        flat = matrix.reshape(-1)
        return torch.cat([drawn @ flat for _, drawn in _drawn(count, flat.shape[0], seed, matrix)])


@_mixed.register_fake
def _(coefficients: Tensor, shape: list[int], seed: int) -> Tensor:
    return coefficients.new_empty(shape)


@_unmixed.register_fake
def _(matrix: Tensor, count: int, seed: int) -> Tensor:
    return matrix.new_empty(count)


def _remember(ctx: Any, inputs: tuple[Tensor, Any, int], output: Tensor) -> None:
    ctx.shape, ctx.seed = inputs[0].shape, inputs[2]


def _mixed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _unmixed(gradient, ctx.shape[0], ctx.seed), None, None


def _unmixed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _mixed(gradient, list(ctx.shape), ctx.seed), None, None


_mixed.register_autograd(_mixed_backward, setup_context=_remember)
_unmixed.register_autograd(_unmixed_backward, setup_context=_remember)
