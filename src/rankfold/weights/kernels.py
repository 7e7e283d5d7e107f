"""Fused products with hand-written backward passes.

Each function keeps for backward only the input and small tensors. Ordinary autograd would keep, for every
adapted layer, an intermediate of the output's size, and would pass over the output once more for every term.
In-place operations inside a custom function are not cast by autocast, so every entry casts first.
Backward passes are written in differentiable operations; where a saved intermediate would hide a dependence
from a second derivative, it is computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .op import autocast_dtype


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _joined(first: Tensor, second: Tensor | None, dim: int) -> Tensor:
    return first if second is None else torch.cat([first, second], dim)


class _LowRankLinear(torch.autograd.Function):
    """y = x W^T + bias + (x [down; down0]^T) [up, up0]^T with up0, down0 frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        frozen_up: Tensor | None,
        frozen_down: Tensor | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        inner = _flat(x) @ _joined(down, frozen_down, 0).T
        y.view(-1, y.shape[-1]).addmm_(inner, _joined(up, frozen_up, 1).T)
        ctx.save_for_backward(x, weight, up, down, frozen_up, frozen_down, inner[:, : down.shape[0]])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, up, down, frozen_up, frozen_down, inner = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_up, needs_down = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            inner = _flat(x) @ down.T
        flat, rank = _flat(grad), down.shape[0]
        grad_inner = flat @ _joined(up, frozen_up, 1)
        grad_x = None
        if needs_x:
            grad_x = (flat @ weight).addmm_(grad_inner, _joined(down, frozen_down, 0)).view(x.shape)
        return (
            grad_x,
            flat.T @ _flat(x) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            flat.T @ inner if needs_up else None,
            grad_inner[:, :rank].T @ _flat(x) if needs_down else None,
            None,
            None,
        )


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    frozen_up: Tensor | None = None,
    frozen_down: Tensor | None = None,
) -> Tensor:
    """Return `x @ (weight + up @ down + frozen_up @ frozen_down).T + bias` in one pass over the output.

    Args:
        x: (..., in).
        weight: (out, in); its gradient is formed only where it requires one.
        bias: (out,) or None.
        up, down: (out, r) and (r, in).
        frozen_up, frozen_down: a second pair whose gradients are not formed.
    """
    dtype = autocast_dtype(x)
    tensors = (x, weight, bias, up, down, frozen_up, frozen_down)
    cast = [None if t is None else t.to(dtype) for t in tensors]
    result: Tensor = _LowRankLinear.apply(*cast)
    return result


class _NormalizedLinear(torch.autograd.Function):
    """y = ratio * (x W^T + (x down^T) up^T) + bias; the gradient of ratio is read off the output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        frozen_up: Tensor | None,
        frozen_down: Tensor | None,
        ratio: Tensor,
    ) -> Tensor:
        inner = _flat(x) @ _joined(down, frozen_down, 0).T
        y = F.linear(x, weight)
        flat = y.view(-1, y.shape[-1])
        flat.addmm_(inner, _joined(up, frozen_up, 1).T).mul_(ratio)
        if bias is not None:
            flat.add_(bias)
        kept = inner[:, : down.shape[0]]
        ctx.save_for_backward(x, weight, bias, up, down, frozen_up, frozen_down, ratio, y, kept)
        return y

    @staticmethod
    @once_differentiable  # the output stands for its unscaled self, which a second derivative would not see
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, up, down, frozen_up, frozen_down, ratio, y, inner = ctx.saved_tensors
        needs = ctx.needs_input_grad
        flat, rank = _flat(grad), down.shape[0]
        grad_ratio = None
        if needs[7]:
            product = (flat * _flat(y)).sum(0)
            if bias is not None:
                product -= flat.sum(0) * bias
            grad_ratio = torch.where(ratio == 0, 0, product / ratio)
        scaled = flat * ratio
        grad_inner = scaled @ _joined(up, frozen_up, 1)
        grad_x = None
        if needs[0]:
            grad_x = (scaled @ weight).addmm_(grad_inner, _joined(down, frozen_down, 0)).view(x.shape)
        return (
            grad_x,
            scaled.T @ _flat(x) if needs[1] else None,
            flat.sum(0) if needs[2] else None,
            scaled.T @ inner if needs[3] else None,
            grad_inner[:, :rank].T @ _flat(x) if needs[4] else None,
            None,
            None,
            grad_ratio,
        )


def normalized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    ratio: Tensor,
    frozen_up: Tensor | None = None,
    frozen_down: Tensor | None = None,
) -> Tensor:
    """Return `ratio * (x @ (weight + up @ down + frozen).T) + bias` with ratio (out,).

    The output itself is kept for the gradient of `ratio`; where a ratio is exactly zero its gradient is taken
    as zero, because the output no longer says what was scaled.
    """
    dtype = autocast_dtype(x)
    tensors = (x, weight, bias, up, down, frozen_up, frozen_down, ratio)
    result: Tensor = _NormalizedLinear.apply(*(None if t is None else t.to(dtype) for t in tensors))
    return result


class _ModulatedLinear(torch.autograd.Function):
    """y = x (W . (1 + up down))^T + bias; the modulated weight is formed again in backward, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, up, down)
        return _modulate(x, weight, bias, up, down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, up, down = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_up, needs_down = ctx.needs_input_grad
        flat, grad_x, grad_weight, grad_up, grad_down = _flat(grad), None, None, None, None
        if needs_x:
            grad_x = _modulate(flat, weight.T, None, down.T, up.T).view(x.shape)
        if needs_weight or needs_up or needs_down:
            grad_change = flat.T @ _flat(x)
            if needs_weight:
                grad_weight = grad_change * (1 + up @ down)
            grad_change = grad_change * weight
            grad_up, grad_down = grad_change @ down.T, up.T @ grad_change
        return grad_x, grad_weight, flat.sum(0) if needs_bias else None, grad_up, grad_down


def _modulate(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return F.linear(x, torch.addcmul(weight, weight, up @ down), bias)
    # In half precision 1 + change would round a small change away: keep the two products apart.
    y = F.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(_flat(x), (weight * (up @ down)).T)
    return y


def modulated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
    """Return `x @ (weight * (1 + up @ down)).T + bias`, keeping only x, weight, up and down for backward."""
    dtype = autocast_dtype(x)
    cast = [None if t is None else t.to(dtype) for t in (x, weight, bias, up, down)]
    result: Tensor = _ModulatedLinear.apply(*cast)
    return result


class _Reflect(torch.autograd.Function):
    """y = x - ((x V) T^T) V^T, which is H x for H = I - V T V^T acting on column vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, core: Tensor) -> Tensor:
        inner = _flat(x) @ vectors
        ctx.save_for_backward(x, vectors, core, inner)
        return torch.addmm(_flat(x), inner @ core.T, vectors.T, alpha=-1).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, vectors, core, inner = ctx.saved_tensors
        if torch.is_grad_enabled():
            inner = _flat(x) @ vectors
        flat = _flat(grad)
        grad_inner = flat @ vectors
        back = grad_inner @ core
        grad_x = (
            torch.addmm(flat, back, vectors.T, alpha=-1).view(x.shape) if ctx.needs_input_grad[0] else None
        )
        grad_vectors = grad_core = None
        if ctx.needs_input_grad[1]:
            grad_vectors = -(flat.T @ (inner @ core.T) + _flat(x).T @ back)
        if ctx.needs_input_grad[2]:
            grad_core = -(grad_inner.T @ inner)
        return grad_x, grad_vectors, grad_core


def reflect(x: Tensor, vectors: Tensor, core: Tensor) -> Tensor:
    """Return `x @ (I - V T V^T).T` for V (n, r) and T (r, r), keeping x and n-by-r tensors only."""
    dtype = autocast_dtype(x)
    result: Tensor = _Reflect.apply(x.to(dtype), vectors.to(dtype), core.to(dtype))
    return result
