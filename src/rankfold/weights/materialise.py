"""Applying an expression through its matrix, formed again in backward instead of kept.

The gradients of the leaves are taken through the matrix, whose own gradient is one wide product, or through
the terms of a sum and the input, where that is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import applied
from .leaves import Base, Dense, stack, standing
from .op import LINEAR, Op, autocast_dtype
from .weight import Leaf, Weight, substituted


class _Materialised(torch.autograd.Function):
    """y = x dense()^T + bias, keeping x and the leaves, and which adapters stand on which.

    `terms` are those that train, if the gradients of the leaves are taken through them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        expression: Weight,
        terms: Sequence[Weight],
        leaves: list[Leaf],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.expression, ctx.terms, ctx.leaves = expression, terms, leaves
        ctx.stand = list(stack(expression))
        return F.linear(x, expression.dense().to(x.dtype), bias)

    @staticmethod
    @once_differentiable  # the matrix is formed again under a graph of its own
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs[5:], strict=True)]
        flat, trained = grad.reshape(-1, grad.shape[-1]), [t for t in wanted if t.requires_grad]
        through = _through_terms if ctx.terms else _through_matrix
        with standing(ctx.stand), substituted(ctx.leaves, wanted):
            matrix, found = through(ctx, x.reshape(-1, x.shape[-1]), flat, trained)
        grads = iter(found)
        grad_x = (flat @ matrix).view(x.shape) if needs[0] else None
        grad_leaves = [next(grads) if need else None for need in needs[5:]]
        return (grad_x, flat.sum(0) if needs[1] else None, None, None, None, *grad_leaves)


Gradients = Sequence[Tensor | None]


def _through_matrix(ctx: Any, x: Tensor, grad: Tensor, trained: list[Tensor]) -> tuple[Tensor, Gradients]:
    """Return the matrix, and the gradients of leaves that its own gradient amounts to."""
    with torch.enable_grad():
        matrix = ctx.expression.dense().to(x.dtype)
    if not trained:
        return matrix, []
    return matrix.detach(), torch.autograd.grad(matrix, trained, grad.T @ x, allow_unused=True)


def _through_terms(ctx: Any, x: Tensor, grad: Tensor, trained: list[Tensor]) -> tuple[Tensor, Gradients]:
    """Return the matrix, and the gradients of leaves by way of their terms and the input."""
    with torch.enable_grad():
        pulled = [pair for term in ctx.terms for pair in term.pull(x.detach(), grad) if pair[0].requires_grad]
    made = [tensor for tensor, _ in pulled]
    found = torch.autograd.grad(made, trained, [g.to(t.dtype) for t, g in pulled], allow_unused=True)
    return ctx.expression.dense().to(x.dtype), found


def materialised_linear(
    expression: Weight, x: Tensor, bias: Tensor | None, terms: Sequence[Weight] = ()
) -> Tensor:
    """Return `x @ expression.dense().T + bias`; neither the matrix nor anything of its size is kept.

    While compiling, ordinary autograd is used.

    Args:
        expression: (out, in).
        x: (..., in).
        bias: (out,) or None.
        terms: those terms of a sum that train, where applying them to x is the cheaper way to the gradients
            of their leaves; none takes the gradient of the matrix.
    """
    dtype = autocast_dtype(x)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    leaves = [leaf for leaf in expression.sources() if type(leaf) in (Base, Dense) or leaf.trainable]
    trained = any(leaf.trainable for leaf in leaves)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not trained:
        return F.linear(x, expression.dense().to(dtype), bias)
    tensors = [leaf.tensor() for leaf in leaves]
    return applied(_Materialised, x, bias, expression, terms, leaves, *tensors)


def through_matrix(expression: Weight, x: Tensor, bias: Tensor | None, op: Op) -> Tensor:
    """Return the expression's matrix applied to x, keeping nothing of its size where the layer is linear."""
    if op is LINEAR:
        return materialised_linear(expression, x, bias)
    return op.apply(x, expression.dense().to(x.dtype), bias)
