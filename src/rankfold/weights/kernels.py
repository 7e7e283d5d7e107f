"""Fused products with hand-written backward passes.

Each function keeps for backward only the input and small tensors. Ordinary autograd would keep, for every
adapted layer, an intermediate of the output's size, and would pass over the output once more for every term.

A product of thin factors has two orders. Applied, the factors meet the activations and accumulate into the
output. Formed, the whole matrix is formed before forward and again before backward, so that forward and the
gradient to the input are one wide product each, and the factors meet the activations for their own gradients
only; that counts less where there are many tokens. In half precision a matrix is never formed: the sum would
round a small change away.

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

_WIDE = (torch.float32, torch.float64)
_PIECE = 64  # tokens


def applied(function: Any, *arguments: Any) -> Tensor:
    """Apply an autograd function, which torch leaves untyped."""
    result: Tensor = function.apply(*arguments)
    return result


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _joined(first: Tensor, second: Tensor | None, dim: int) -> Tensor:
    return first if second is None else torch.cat([first, second], dim)


def _cast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast to the dtype that a product of the first one runs in."""
    dtype = autocast_dtype(tensors[0])  # type: ignore[arg-type]
    return [None if t is None else t.to(dtype) for t in tensors]


def forms(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, blocks: int = 1) -> bool:
    """Say whether forming a matrix (out, in) costs fewer multiply-adds than applying its thin factors to x.

    Per unit of rank, applying costs tokens (in + out) each in forward and for the gradient to the input,
    forming costs in out / blocks each, for a grid of that many blocks a side; without gradients there is
    forward only.
    """
    uses = 2 if torch.is_grad_enabled() else 1
    out, columns = shape
    return x.numel() * (out + columns) * blocks > uses * out * columns * columns and dtype in _WIDE


def _form(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (up @ down).add_(weight)


def _evaluated(
    formed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the output, and `x down^T` where factors were applied; ratio (out,) scales all but the bias."""
    if formed:
        matrix = _form(weight, up, down)
        return F.linear(x, matrix if ratio is None else matrix.mul_(ratio[:, None]), bias), None
    y = F.linear(x, weight, bias if ratio is None else None)
    flat, inner = y.view(-1, len(up)), F.linear(_flat(x), down)
    flat.addmm_(inner, up.T)
    if ratio is not None:
        flat.mul_(ratio)
        if bias is not None:
            flat.add_(bias)
    return y, inner


def _thin(first: Tensor, second: Tensor) -> Tensor:
    """Return `second.T @ first` with the thin matrix on the left, where matrix products are fastest."""
    return (first.T @ second).T


class _LowRankLinear(torch.autograd.Function):
    """y = x W^T + bias + (x [down; down0]^T) [up, up0]^T with up0, down0 frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        formed: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        frozen_up: Tensor | None,
        frozen_down: Tensor | None,
    ) -> Tensor:
        all_up, all_down = _joined(up, frozen_up, 1), _joined(down, frozen_down, 0)
        y, inner = _evaluated(formed, x, weight, bias, all_up, all_down)
        if inner is not None:
            inner = inner[:, : down.shape[0]]
        ctx.save_for_backward(x, weight, up, down, frozen_up, frozen_down, inner)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, frozen_up, frozen_down, inner = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, needs_up, needs_down = ctx.needs_input_grad[:6]
        flat, flat_x = _flat(grad), _flat(x)
        all_up, all_down = _joined(up, frozen_up, 1), _joined(down, frozen_down, 0)
        grad_x = grad_inner = None
        if needs_x and inner is None:
            grad_x = flat @ _form(weight, all_up, all_down)
        elif needs_x:
            grad_inner = flat @ all_up
            grad_x = (flat @ weight).addmm_(grad_inner, all_down)
            grad_inner = grad_inner[:, : down.shape[0]]
        if needs_down and grad_inner is None:
            grad_inner = flat @ up
        if needs_up and (inner is None or torch.is_grad_enabled()):
            inner = F.linear(flat_x, down)
        return (
            None,
            None if grad_x is None else grad_x.view(x.shape),
            flat.T @ flat_x if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            _thin(inner, flat) if needs_up else None,
            grad_inner.T @ flat_x if needs_down else None,  # type: ignore[union-attr]
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
        up: (out, r).
        down: (r, in).
        frozen_up: (out, r') of a second pair, whose gradients are not formed, or None.
        frozen_down: (r', in), or None.
    """
    tensors = _cast(x, weight, bias, up, down, frozen_up, frozen_down)
    formed = forms(x, weight.shape, tensors[0].dtype)  # type: ignore[union-attr]
    return applied(_LowRankLinear, formed, *tensors)


class _NormalizedLinear(torch.autograd.Function):
    """y = m / n * (x W^T + (x down^T) up^T) + bias; the gradient of m / n is read off the output.

    Without a given n it is the row norm of the matrix that is formed, a constant for autograd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        formed: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        frozen_up: Tensor | None,
        frozen_down: Tensor | None,
        magnitude: Tensor,
        norm: Tensor | None,
    ) -> Tensor:
        all_up, all_down = _joined(up, frozen_up, 1), _joined(down, frozen_down, 0)
        if norm is None:
            matrix = _form(weight, all_up, all_down)
            ratio = safe_ratio(magnitude, torch.linalg.vector_norm(matrix, dim=1)).to(x.dtype)
            y = F.linear(x, matrix.mul_(ratio[:, None]), bias)
        else:
            ratio = safe_ratio(magnitude, norm).to(x.dtype)
            y, _ = _evaluated(formed, x, weight, bias, all_up, all_down, ratio)
        ctx.formed = formed
        kept = (x, weight, bias, up, down, frozen_up, frozen_down, magnitude, norm, ratio, y)
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @once_differentiable  # the output stands for its unscaled self, which a second derivative would not see
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, up, down, frozen_up, frozen_down, magnitude, norm, ratio, y = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_up, needs_down = ctx.needs_input_grad[1:6]
        needs_magnitude, needs_norm = ctx.needs_input_grad[8:]
        flat, flat_x, column = _flat(grad), _flat(x), ratio[:, None]
        all_up, all_down = _joined(up, frozen_up, 1), _joined(down, frozen_down, 0)
        grad_x = product = None
        if needs_x and ctx.formed:
            grad_x = flat @ _form(weight, all_up, all_down).mul_(column)
        elif needs_x:
            scaled = flat * ratio
            grad_x = (scaled @ weight).addmm_(scaled @ all_up, all_down)
        if needs_magnitude or needs_norm:
            product = column_products(flat, _flat(y))
            product = product if bias is None else product - flat.sum(0, dtype=product.dtype) * bias
        return (
            None,
            None if grad_x is None else grad_x.view(x.shape),
            column * (flat.T @ flat_x) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            column * _thin(F.linear(flat_x, down), flat) if needs_up else None,
            (flat @ (column * up)).T @ flat_x if needs_down else None,
            None,
            None,
            safe_ratio(product, magnitude) if needs_magnitude else None,  # type: ignore[arg-type]
            -safe_ratio(product, norm) if needs_norm else None,  # type: ignore[arg-type]
        )


def safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide entry by entry, in the wider dtype; zero where the denominator is zero."""
    zero = denominator == 0
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """Return the dtype that row and column sums of a tensor are taken in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def column_products(first: Tensor, second: Tensor) -> Tensor:
    """Return `(first * second).sum(0)`; on a CPU in pieces that stay in the cache."""
    if first.device.type != "cpu" or first.dtype not in _WIDE or len(first) < 2 * _PIECE:
        return (first * second).sum(0, dtype=at_least_float32(first))
    whole = len(first) - len(first) % _PIECE
    total = first[:_PIECE] * second[:_PIECE]
    for start in range(_PIECE, whole, _PIECE):
        total.addcmul_(first[start : start + _PIECE], second[start : start + _PIECE])
    return total.sum(0) + (first[whole:] * second[whole:]).sum(0)


def normalized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pair: tuple[Tensor, Tensor],
    frozen: tuple[Tensor, Tensor] | None,
    magnitude: Tensor,
    norm: Tensor | None = None,
) -> Tensor:
    """Return `x @ V'.T + bias`: V' is `V = weight + up @ down + frozen`, its rows times magnitude / norm.

    The output itself is kept for the gradient of the magnitude; where a magnitude is exactly zero its
    gradient is taken as zero, because the output no longer says what was scaled. A zero row of V stays zero.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        pair: up (out, r) and down (r, in).
        frozen: a second pair whose gradients are not formed, or None.
        magnitude: (out,).
        norm: (out,); None takes the row norms of V as constants, which needs `forms` to hold.
    """
    tensors = _cast(x, weight, bias, *pair, *(frozen or (None, None)))
    formed = forms(x, weight.shape, tensors[0].dtype)  # type: ignore[union-attr]
    return applied(_NormalizedLinear, formed, *tensors, magnitude, norm)


def scaled_low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, ratio: Tensor | None = None
) -> Tensor:
    """Return `ratio * (x @ (weight + up @ down).T) + bias` without a graph; ratio (out,) or None for 1."""
    if not x.dtype == weight.dtype == up.dtype == down.dtype or torch.is_autocast_enabled(x.device.type):
        x, weight, bias, up, down, ratio = _cast(x, weight, bias, up, down, ratio)  # type: ignore[assignment]
    return _evaluated(forms(x, weight.shape, x.dtype), x, weight, bias, up, down, ratio)[0]


class _ModulatedLinear(torch.autograd.Function):
    """y = x (W . (1 + up down))^T + bias; the modulated weight is formed again in backward, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, up, down)
        if x.dtype in _WIDE:
            return F.linear(x, _modulate(weight, up, down), bias)
        # In half precision 1 + change would round a small change away: keep the two products apart.
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(_flat(x), (up @ down).mul_(weight).T)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_up, needs_down = ctx.needs_input_grad
        flat, grad_x, grad_weight, grad_up, grad_down = _flat(grad), None, None, None, None
        if needs_x and x.dtype in _WIDE:
            grad_x = (flat @ _modulate(weight, up, down)).view(x.shape)
        elif needs_x:
            grad_x = (flat @ weight).addmm_(flat, (up @ down) * weight).view(x.shape)
        if needs_weight or needs_up or needs_down:
            grad_change = flat.T @ _flat(x)
            if needs_weight:
                grad_weight = grad_change * (1 + up @ down)
            grad_change = grad_change * weight
            grad_up, grad_down = grad_change @ down.T, up.T @ grad_change
        return grad_x, grad_weight, flat.sum(0) if needs_bias else None, grad_up, grad_down


def _modulate(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (up @ down).mul_(weight).add_(weight)


def modulated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
    """Return `x @ (weight * (1 + up @ down)).T + bias`, keeping only x, weight, up and down for backward."""
    return applied(_ModulatedLinear, *_cast(x, weight, bias, up, down))


class _GridLinear(torch.autograd.Function):
    """y = x (W + grid(up, down))^T + bias; block (j, n) is up[j][:, n] down[n][j] with k x k blocks."""

    @staticmethod
    def forward(
        ctx: Any, formed: bool, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor
    ) -> Tensor:
        ctx.formed = formed
        ctx.save_for_backward(x, weight, up, down)
        if formed:
            return F.linear(x, grid_matrix(up, down).add_(weight), bias)
        y = F.linear(x, weight, bias)
        inner = _exchange(_blocks(_flat(x), len(up)) @ down.mT)
        return y.add_((inner @ up.mT).transpose(0, 1).reshape(y.shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, needs_up, needs_down = ctx.needs_input_grad
        flat, count, grad_x = _flat(grad), len(up), None
        blocks, blocks_x = _blocks(flat, count), _blocks(_flat(x), count)
        grad_inner = _exchange(blocks @ up) if needs_down or not ctx.formed else None
        if needs_x and ctx.formed:
            grad_x = flat @ grid_matrix(up, down).add_(weight)
        elif needs_x:
            grad_x = flat @ weight
            grad_x = grad_x + (grad_inner @ down).transpose(0, 1).reshape(grad_x.shape)
        return (
            None,
            None if grad_x is None else grad_x.view(x.shape),
            flat.T @ _flat(x) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            (_exchange(blocks_x @ down.mT).mT @ blocks).mT if needs_up else None,
            grad_inner.mT @ blocks_x if needs_down else None,  # type: ignore[union-attr]
        )


def _blocks(flat: Tensor, count: int) -> Tensor:
    """See (tokens, channels) as (count, tokens, channels / count)."""
    blocks: Tensor = flat.unflatten(-1, (count, -1)).transpose(0, 1)
    return blocks


def _exchange(inner: Tensor) -> Tensor:
    """Exchange the two block axes: (k, tokens, k q) to (k, tokens, k q)."""
    exchanged: Tensor = inner.unflatten(-1, (len(inner), -1)).permute(2, 1, 0, 3).flatten(2)
    return exchanged


def grid_matrix(up: Tensor, down: Tensor) -> Tensor:
    """Return the matrix (out, in) of k x k blocks: (j, n) is `up[j, :, n q:(n+1) q] @ down[n, j q:(j+1) q]`.

    Args:
        up: (k, out / k, k q).
        down: (k, k q, in / k).
    """
    count = len(up)
    left = up.unflatten(2, (count, -1)).transpose(1, 2)
    right = down.unflatten(1, (count, -1)).transpose(0, 1)
    matrix: Tensor = (left @ right).transpose(1, 2).reshape(count * up.shape[1], -1)
    return matrix


def grid_linear(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
    """Return `x @ (weight + grid_matrix(up, down)).T + bias`, keeping only x and the factors for backward."""
    tensors = _cast(x, weight, bias, up, down)
    formed = forms(x, weight.shape, tensors[0].dtype, len(up))  # type: ignore[union-attr]
    return applied(_GridLinear, formed, *tensors)


class _Scaled(torch.autograd.Function):
    """diag(left) M diag(right) for a frozen M; both gradients are read off grad . M."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, left, right)
        return (matrix * right).mul_(left[:, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, left, right = ctx.saved_tensors
        product = grad * matrix
        return None, product @ right, left @ product


def scaled_matrix(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `diag(left) @ matrix @ diag(right)` for a frozen matrix (n, m), keeping nothing of its size."""
    return applied(_Scaled, matrix, left, right)


class _Reflect(torch.autograd.Function):
    """y = x - ((x V) T^T) V^T, which is H x for H = I - V T V^T acting on column vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, core: Tensor) -> Tensor:
        inner = _flat(x) @ vectors
        ctx.save_for_backward(x, vectors, core, inner)
        return torch.addmm(_flat(x), inner @ core.T, vectors.T, alpha=-1).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
    return applied(_Reflect, x.to(dtype), vectors.to(dtype), core.to(dtype))
