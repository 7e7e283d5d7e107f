"""A frozen matrix that is kept in a format of few bits and read out wherever it is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg import NormalFloat, dequantise
from .kernels import applied
from .op import LINEAR, Op, autocast_dtype
from .weight import Leaf, Weight


class _Read(torch.autograd.Function):
    """y = x Q^T + bias, keeping the codes of Q alone: backward reads them out again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Quantised, names: Sequence[str], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.weight, ctx.names = weight, names
        return F.linear(x, weight.read(dict(zip(names, tensors, strict=True))).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs, grad_x = ctx.needs_input_grad, None
        if needs[0]:
            matrix = ctx.weight.read(dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
            grad_x = grad @ matrix.to(grad.dtype)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs[1] else None
        return grad_x, grad_bias, None, None, *(None for _ in ctx.names)


class Quantised(Weight):
    """A frozen matrix in a format of few bits, see `linalg.NormalFloat`: codes, and scales of blocks.

    Forward and backward read the matrix out, and neither keeps it.

    Args:
        form: the format.
        tensors: leaves by the names of `form.layout`; none is trained.
        shape: (out, in).
        dtype: that the matrix is read out in, at least that of its scales.

    Example:
        >>> import torch
        >>> from rankfold.linalg import NormalFloat, quantise
        >>> from rankfold.weights import frozen
        >>> form = NormalFloat(4, 16, None)
        >>> tensors = quantise(torch.eye(4), form)
        >>> w = Quantised(form, {name: frozen(value, name) for name, value in tensors.items()}, (4, 4))
        >>> w, bool((w.dense() == torch.eye(4)).all()), w.count().bytes
        (nf4-16-fp32[4x4](codes[8], scales[1]), True, 12)
    """

    def __init__(
        self,
        form: NormalFloat,
        tensors: Mapping[str, Leaf],
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(shape)
        self.form, self.dtype = form, dtype
        self.tensors: Mapping[str, Leaf] = nn.ModuleDict(tensors)  # type: ignore[assignment]

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix (out, in) that tensors of this format stand for."""
        return dequantise(tensors, self.form, self.shape, self.dtype)

    def values(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: leaf.tensor() for name, leaf in self.tensors.items()}

    def dense(self) -> Tensor:
        """Return the matrix (out, in)."""
        return self.read(self.values())

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the matrix to an input."""
        keeps_nothing = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if op is not LINEAR or not keeps_nothing:
            return super().forward(x, bias, op)
        dtype, tensors = autocast_dtype(x), self.values()
        bias = None if bias is None else bias.to(dtype)
        return applied(_Read, x.to(dtype), bias, self, tuple(tensors), *tensors.values())

    def map(self, x: Tensor) -> Tensor:
        """Apply the matrix to the last axis of x: (..., in) to (..., out)."""
        return self(x) if torch.is_grad_enabled() else super().map(x)

    def dense_macs(self) -> int:
        """Return out * in: every number is a level times its block's scale."""
        return self.shape[0] * self.shape[1]

    def formula(self) -> str:
        """Return the format, the shape and the leaves."""
        leaves = ", ".join(leaf.formula() for leaf in self.tensors.values())
        return f"{self.form}[{self.shape[0]}x{self.shape[1]}]({leaves})"
