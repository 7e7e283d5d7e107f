"""Fused products of a weight and a change whose gradients need less than the input, or less than all of it.

Where forming the matrix pays, forward and the gradient to the input are one wide product each, and the matrix
is formed again in backward. In half precision it is never formed (`kernels`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import applied, column_products, forms, safe_ratio
from .op import autocast_dtype

WIDE = (torch.float32, torch.float64)
_PIECE = 128  # tokens that stay in a processor's cache together
_DIVISOR = 1e-2  # outputs are not divided by less than this


def tiled(shard: Tensor, columns: int) -> Tensor:
    """Repeat the last axis until the columns are filled, the last copy cut."""
    copies = -(-columns // shard.shape[-1])
    return shard.repeat(*[1] * (shard.dim() - 1), copies)[..., :columns]


def shard_sum(x: Tensor, size: int) -> Tensor:
    """Add the shards of the last axis, (..., in) to (..., size); the transpose of `tiled`."""
    missing = -x.shape[-1] % size
    padded = F.pad(x, (0, missing)) if missing else x
    total: Tensor = padded.unflatten(-1, (-1, size)).sum(-2)
    return total


class _InnerLinear(torch.autograd.Function):
    """y = x W^T + bias + inner up^T for inner = x down^T with down frozen, or the sum of x's shards.

    What inner owes to x is part of x's gradient here, so inner itself gets none. It is an argument so that
    second derivatives see it, and is kept in the place of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        formed: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor | None,
        inner: Tensor,
    ) -> Tensor:
        ctx.formed = formed
        ctx.save_for_backward(weight, up, down, inner)
        if formed:
            return F.linear(x, _with_change(weight, up, down), bias)
        y = F.linear(x, weight, bias)
        y.view(-1, len(up)).addmm_(inner.reshape(-1, up.shape[1]), up.T)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, up, down, inner = ctx.saved_tensors
        flat, grad_x = grad.reshape(-1, grad.shape[-1]), None
        if ctx.needs_input_grad[1] and ctx.formed:
            grad_x = flat @ _with_change(weight, up, down)
        elif ctx.needs_input_grad[1]:
            back = flat @ up
            grad_x = flat @ weight + (tiled(back, weight.shape[1]) if down is None else back @ down)
        return (
            None,
            None if grad_x is None else grad_x.view(*grad.shape[:-1], weight.shape[1]),
            None,
            flat.sum(0) if ctx.needs_input_grad[3] else None,
            (inner.reshape(-1, up.shape[1]).T @ flat).T if ctx.needs_input_grad[4] else None,
            None,
            None,
        )


def _with_change(weight: Tensor, up: Tensor, down: Tensor | None) -> Tensor:
    if down is not None:
        return (up @ down).add_(weight)
    if weight.shape[1] % up.shape[1]:
        return weight + tiled(up, weight.shape[1])
    formed: Tensor = (weight.unflatten(1, (-1, up.shape[1])) + up[:, None]).flatten(1)
    return formed


def inner_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor | None = None
) -> Tensor:
    """Return `x @ (weight + up @ down).T + bias`, keeping r numbers a token for backward instead of x.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None.
        up: (out, r).
        down: (r, in), frozen; None for the identity repeated along the input, which is never multiplied.
    """
    dtype = autocast_dtype(x)
    x, weight, up = x.to(dtype), weight.to(dtype), up.to(dtype)
    bias, down = (None if t is None else t.to(dtype) for t in (bias, down))
    inner = shard_sum(x, up.shape[1]) if down is None else F.linear(x, down)
    formed = dtype in WIDE if down is None else forms(x, weight.shape, dtype)
    return applied(_InnerLinear, formed, x, weight, bias, up, down, inner)


class _KroneckerLinear(torch.autograd.Function):
    """y = x (W + left (x) right)^T + bias; only x and the two factors are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, left, right)
        return F.linear(x, kronecker_matrix(left, right).add_(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *needs_factors = ctx.needs_input_grad
        flat, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        matrix = kronecker_matrix(left, right).add_(weight) if needs_x else None
        factors = _kronecker_gradients(flat, flat_x, left, right) if any(needs_factors) else (None, None)
        return (
            None if matrix is None else (flat @ matrix).view(x.shape),
            flat.T @ flat_x if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            *factors,
        )


def kronecker_matrix(left: Tensor, right: Tensor) -> Tensor:
    """Return the Kronecker product of two matrices."""
    shape = [n * m for n, m in zip(left.shape, right.shape, strict=True)]
    return (left[:, None, :, None] * right[None, :, None, :]).reshape(shape)


def _kronecker_gradients(grad: Tensor, x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors' gradients: (G_t R) X_t^T and (L^T G_t)^T X_t, over tokens seen as matrices."""
    grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
    step = _PIECE if x.device.type == "cpu" and not torch.compiler.is_compiling() else max(1, len(x))
    for start in range(0, len(x), step):
        inputs = _by_block(x[start : start + step], left.shape[1])
        outputs = _by_block(grad[start : start + step], left.shape[0])
        met = outputs.view(-1, right.shape[0]) @ right
        grad_left = torch.addmm(grad_left, met.view(len(left), -1), inputs.T)
        mixed = (left.T @ outputs).view(-1, right.shape[0])
        grad_right = torch.addmm(grad_right, mixed.T, inputs.view(-1, right.shape[1]))
    return grad_left, grad_right


def _by_block(tokens: Tensor, count: int) -> Tensor:
    """See (tokens, channels) as (count, tokens * channels / count)."""
    return tokens.reshape(len(tokens), count, -1).transpose(0, 1).reshape(count, -1)


def kronecker_linear(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return `x @ (weight + kron(left, right)).T + bias` through the matrix, but not its gradient.

    Args:
        x: (..., b d), in float32 or float64.
        weight: (a c, b d).
        bias: (a c,) or None.
        left: (a, b).
        right: (c, d).
    """
    return applied(_KroneckerLinear, x, weight, bias, left, right)


class _RescaledLinear(torch.autograd.Function):
    """y = x (diag(left) W diag(right))^T + bias; both gradients are read off the output and x's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor
    ) -> Tensor:
        y = F.linear(x, (weight * right).mul_(left[:, None]), bias)
        ctx.save_for_backward(x, weight, bias, left, right, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, left, right, y = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        flat, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = flat @ (weight * right * left[:, None])
        grad_bias = flat.sum(0) if bias is not None else None
        if torch.is_grad_enabled():  # a second derivative would not see what the output stands for
            met = (flat.T @ flat_x) * weight
            grad_left, grad_right = met @ right, left @ met
        else:
            read = column_products(flat, y.view(flat.shape))
            read = read if bias is None else read - grad_bias * bias
            grad_left = _divided(read, left, weight * right, flat, flat_x)
            other = column_products(flat_x, grad_x)
            grad_right = _divided(other, right, (left[:, None] * weight).T, flat_x, flat)
        return (
            grad_x.view(x.shape) if needs_x else None,
            left[:, None] * (flat.T @ flat_x) * right if needs_weight else None,
            grad_bias if needs_bias else None,
            grad_left,
            grad_right,
        )


def _divided(product: Tensor, factor: Tensor, matrix: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """Return product / factor; where that loses digits, the rows' sums of `matrix . (near^T far)`."""
    result = safe_ratio(product, factor)
    lost = (factor.abs() < _DIVISOR).nonzero().flatten()
    if len(lost):
        result[lost] = ((near[:, lost].T @ far) * matrix[lost]).sum(1)
    return result


def rescaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return `x @ (diag(left) @ weight @ diag(right)).T + bias`; the output is kept beside x.

    Args:
        x: (..., in), in float32 or float64.
        weight: (out, in).
        bias: (out,) or None.
        left: (out,).
        right: (in,).
    """
    return applied(_RescaledLinear, x, weight, bias, left, right)


def pays(x: Tensor, matrix_macs: int, applied_macs: int) -> bool:
    """Say whether a matrix is to be formed that takes so many multiply-adds, in the dtype x is met in."""
    return autocast_dtype(x) == x.dtype and x.dtype in WIDE and matrix_macs < applied_macs
