"""Applying an expression through its matrix, formed again in backward instead of kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import applied
from .leaves import Base, Dense, stack, standing
from .op import autocast_dtype
from .weight import Leaf, Weight, substituted


class _Materialised(torch.autograd.Function):
    """y = x dense()^T + bias, keeping x and the leaves, and which adapters stand on which."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, expression: Weight, leaves: list[Leaf], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.expression, ctx.leaves = expression, leaves
        ctx.stand = list(stack(expression))
        return F.linear(x, expression.dense().to(x.dtype), bias)

    @staticmethod
    @once_differentiable  # the matrix is formed again under a graph of its own
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        flat, needs = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        with torch.enable_grad():
            wanted = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs[4:], strict=True)]
            with standing(ctx.stand), substituted(ctx.leaves, wanted):
                matrix = ctx.expression.dense().to(x.dtype)
        grad_x = (flat @ matrix.detach()).view(x.shape) if needs[0] else None
        trained = [t for t in wanted if t.requires_grad]
        grad_matrix = flat.T @ x.reshape(-1, x.shape[-1])
        grads = iter(torch.autograd.grad(matrix, trained, grad_matrix, allow_unused=True) if trained else ())
        grad_leaves = [next(grads) if need else None for need in needs[4:]]
        return (grad_x, flat.sum(0) if needs[1] else None, None, None, *grad_leaves)


def materialised_linear(expression: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x @ expression.dense().T + bias`; neither the matrix nor anything of its size is kept.

    While compiling, ordinary autograd is used.
    """
    dtype = autocast_dtype(x)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    leaves = [leaf for leaf in expression.sources() if type(leaf) in (Base, Dense) or leaf.trainable]
    trained = any(leaf.trainable for leaf in leaves)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not trained:
        return F.linear(x, expression.dense().to(dtype), bias)
    tensors = [leaf.tensor() for leaf in leaves]
    return applied(_Materialised, x, bias, expression, leaves, *tensors)
