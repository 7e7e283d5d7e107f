"""A matrix kept as two outer factors around a core, whose outer factors learn as if the core were not there.

    W = L C R:   dL = G R^T,   dR = L^T G,   dC = L^T G R^T

Of the product's own derivatives, dL = G R^T C^T and dR = C^T L^T G, small entries of the core would leave
nothing, and dividing them out again would be unstable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .composites import Composite, Factors, cast_pair
from .kernels import applied
from .leaves import Dense
from .op import LINEAR, Op, autocast_dtype
from .weight import Leaf, inference, tick


class Sliced(Leaf):
    """Some entries of a vector: `value = inner[start:stop]`.

    Args:
        inner: leaf (n,).
        start, stop: of the entries.
        name: the method's own name for them.
        holds: register the vector here, which one of several that read it has to do.
    """

    stored = False

    def __init__(self, inner: Leaf, start: int, stop: int, name: str, *, holds: bool = True) -> None:
        super().__init__(name, (stop - start,))
        self._inner, self.start = (inner,), start
        if holds:
            self.held = inner

    @property
    def inner(self) -> Leaf:
        """The vector."""
        return self._inner[0]

    @property
    def trainable(self) -> bool:
        """Whether the vector is trained."""
        return self.inner.trainable

    def source(self) -> Tensor:
        """Return the entries."""
        return self.inner.tensor()[self.start : self.start + self.shape[0]]


class Spectral(Composite[Factors]):
    """`left core right`; the gradients of the outer factors leave the core out.

    Args:
        left: leaf (out, k).
        core: leaf (k, k), or (k,) for a diagonal.
        right: leaf (k, in).

    Attributes:
        detach: leave the core out of those gradients; without it they are the product's own.
    """

    def __init__(self, left: Leaf, core: Leaf, right: Leaf) -> None:
        super().__init__((left.shape[0], right.shape[1]))
        self.left, self.core, self.right, self.detach = left, core, right, True

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.left.tensor(), self.core.tensor(), self.right.tensor()

    def sources(self) -> Iterator[Leaf]:
        """Yield every leaf that evaluation reads, a vector that another expression holds included."""
        yield from super().sources()
        if isinstance(self.core, Sliced) and not hasattr(self.core, "held"):
            yield self.core.inner

    def derived(self) -> Factors:
        """Return left core, and right: the two matrices that evaluation takes."""
        left, core, right = self._factors()
        return _times(left, core), right

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        if inference() or not self.detach:
            up, down = self.derived()
            return up @ down
        return applied(_SpectralMatrix, *self._factors())

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the three factors one after the other, or as two where no gradients are wanted."""
        if inference():
            return op.add(op.low_rank(x, *cast_pair(self.keep(), x)), bias)
        if self._kept is not None and not torch.compiler.is_compiling():
            self.forget()
        x = x.to(autocast_dtype(x))
        left, core, right = (tensor.to(x.dtype) for tensor in self._factors())
        if op is LINEAR and self.detach:
            return op.add(applied(_SpectralLinear, x, left, core, right), bias)
        if not self.detach:
            return op.add(op.low_rank(x, _times(left, core), right), bias)
        # The first product is the output and feeds core and input; the second one, which is taken away again,
        # feeds the outer factors.
        y = op.low_rank(x, _times(left.detach(), core), right.detach())
        outer = op.low_rank(x.detach(), left, right)
        return op.add(y + (outer - outer.detach()), bias)

    map = forward

    def macs(self, tokens: int) -> int:
        """Return those of the three factors."""
        return tokens * (self.left.shape[1] * sum(self.shape) + math.prod(self.core.shape))

    def dense_macs(self) -> int:
        """Return the multiply-adds of multiplying the factors out."""
        out, columns = self.shape
        return out * (math.prod(self.core.shape) + self.left.shape[1] * columns)

    @torch.no_grad()
    def resize(self, left: Tensor, core: Tensor, right: Tensor) -> None:
        """Hold factors of another rank from now on."""
        for leaf, value in ((self.left, left), (self.core, core), (self.right, right)):
            assert isinstance(leaf, Dense)
            leaf.resize(value)
        tick()

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the rank of tensors that are about to be copied in, by leaf name; else stay as it is."""
        leaves = (self.left, self.core, self.right)
        given = [tensors[leaf.name] for leaf in leaves if leaf.name in tensors]
        if len(given) < 3 or not all(isinstance(leaf, Dense) for leaf in leaves):
            return
        rank = given[2].shape[0] if given[2].dim() == 2 else -1
        core = (rank,) * len(self.core.shape)
        wanted = [(self.shape[0], rank), core, (rank, self.shape[1])]
        if [tuple(value.shape) for value in given] == wanted and rank != self.left.shape[1]:
            self.resize(*(torch.empty_like(value) for value in given))

    def formula(self) -> str:
        """Return the factors; the core of a diagonal as such."""
        core = self.core.formula()
        core = f"diag({core})" if len(self.core.shape) == 1 else core
        return f"{self.left.formula()} . {core} . {self.right.formula()}"


def _times(left: Tensor, core: Tensor) -> Tensor:
    return left * core if core.dim() == 1 else left @ core


class _SpectralLinear(torch.autograd.Function):
    """y = x right^T core^T left^T, keeping x R^T, and x where R is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
        inner = F.linear(x, right)
        ctx.save_for_backward(x if right.requires_grad else None, inner, left, core, right)
        return F.linear(inner * core if core.dim() == 1 else F.linear(inner, core), left)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, left, core, right = ctx.saved_tensors
        needs_x, needs_left, needs_core, needs_right = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        inner = inner.reshape(len(flat), len(right))
        outer, grad_x, grad_core = flat @ left, None, None
        if needs_core:
            grad_core = (outer * inner).sum(0) if core.dim() == 1 else outer.T @ inner
        if needs_x:
            grad_x = (_times(outer, core) @ right).view(*grad.shape[:-1], right.shape[1])
        return (
            grad_x,
            flat.T @ inner if needs_left else None,
            grad_core,
            outer.T @ x.reshape(-1, right.shape[1]) if needs_right else None,
        )


class _SpectralMatrix(torch.autograd.Function):
    """left core right, with the gradients of a Spectral."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, core, right)
        return _times(left, core) @ right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, core, right = ctx.saved_tensors
        needs_left, needs_core, needs_right = ctx.needs_input_grad
        outer, grad_core = grad @ right.T, None
        if needs_core:
            grad_core = (left * outer).sum(0) if core.dim() == 1 else left.T @ outer
        return (
            outer if needs_left else None,
            grad_core,
            left.T @ grad if needs_right else None,
        )
