"""Block-diagonal and Kronecker products with hand-written backward passes, which keep the input only.

While training, small blocks are multiplied as larger ones with zeros beside them: products of many tokens
with tiny matrices take longer than the multiply-adds that this adds. As in `kernels`, backward passes are
written in differentiable operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import applied
from .op import autocast_dtype

_WIDE = (torch.float32, torch.float64)
_TOGETHER = 32  # rows and columns of the blocks that are multiplied


def _merging(tokens: int, blocks: torch.Size) -> int:
    """Return how many blocks (N, rows, columns) are multiplied as one."""
    count, *sides = blocks
    if tokens < _TOGETHER or not torch.is_grad_enabled():
        return 1
    return min(count, max(1, _TOGETHER // max(sides)))


def _merged(blocks: Tensor, together: int) -> Tensor:
    """See N blocks (N, rows, columns) as N / m blocks of m by m each, with zeros beside them."""
    if together == 1:
        return blocks
    count, rows, columns = blocks.shape
    groups = -(-count // together)
    padded = F.pad(blocks, (0, 0, 0, 0, 0, groups * together - count))
    padded = padded.reshape(groups, together, rows, columns)
    one = torch.eye(together, dtype=blocks.dtype, device=blocks.device)[:, None, :, None]
    return (padded[:, :, :, None] * one).reshape(groups, together * rows, together * columns)


def _parted(merged: Tensor, shape: torch.Size, together: int) -> Tensor:
    """Return the blocks (N, rows, columns) that stand on the diagonal of merged ones."""
    if together == 1:
        return merged
    count, rows, columns = shape
    grid = merged.reshape(-1, together, rows, together, columns).diagonal(dim1=1, dim2=3)
    parts: Tensor = grid.movedim(-1, 1).reshape(-1, rows, columns)[:count]
    return parts


def _grouped(flat: Tensor, groups: int, size: int) -> Tensor:
    """See (tokens, channels) as (groups, tokens, size), zeros where channels end early."""
    missing = groups * size - flat.shape[1]
    flat = F.pad(flat, (0, missing)) if missing else flat
    grouped: Tensor = flat.unflatten(1, (groups, size)).transpose(0, 1)
    return grouped


def _times(flat: Tensor, matrices: Tensor, channels: int) -> Tensor:
    """Multiply every group of channels by its own matrix (groups, rows, columns), and crop the result."""
    groups, rows, columns = matrices.shape
    grouped = _grouped(flat, groups, rows)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or columns < _TOGETHER // 2:
        return (grouped @ matrices).transpose(0, 1).flatten(1)[:, :channels]
    y = flat.new_empty(len(flat), groups * columns)
    torch.bmm(grouped, matrices, out=y.unflatten(1, (groups, columns)).transpose(0, 1))
    return y[:, :channels]


class _BlockDiagonal(torch.autograd.Function):
    """y = x blockdiag(D_1, ..., D_N)^T, cropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, out: int, together: int) -> Tensor:
        ctx.save_for_backward(x, blocks)
        ctx.together = together
        y = _times(x.reshape(-1, x.shape[-1]), _merged(blocks, together).mT, out)
        return y.reshape(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks = ctx.saved_tensors
        flat, grad_x = grad.reshape(-1, grad.shape[-1]), None
        if ctx.needs_input_grad[0]:
            grad_x = _times(flat, _merged(blocks, ctx.together), x.shape[-1]).reshape(x.shape)
        grad_blocks = None
        if ctx.needs_input_grad[1]:
            grad_blocks = block_gradients(x.reshape(-1, x.shape[-1]), flat, blocks.shape, ctx.together)
        return grad_x, grad_blocks, None, None


class _RotatedLinear(torch.autograd.Function):
    """y = x (W blockdiag(C_1, ..., C_N))^T + bias; formed where the weight has fewer rows than x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, together: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, blocks)
        ctx.together, flat = together, x.reshape(-1, x.shape[-1])
        merged = _merged(blocks, together)
        if len(weight) < len(flat) and x.dtype in _WIDE:
            return F.linear(x, _times(weight, merged, x.shape[-1]), bias)
        return F.linear(_times(flat, merged.mT, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, blocks = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_blocks = ctx.needs_input_grad[:4]
        flat, flat_x, merged = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), None
        back, grad_weight = flat @ weight, None
        if needs_x or needs_weight:
            merged = _merged(blocks, ctx.together)
        if needs_weight:
            grad_weight = flat.T @ _times(flat_x, merged.mT, weight.shape[1])  # type: ignore[union-attr]
        return (
            _times(back, merged, weight.shape[1]).view(x.shape) if needs_x else None,  # type: ignore[arg-type]
            grad_weight,
            flat.sum(0) if needs_bias else None,
            block_gradients(flat_x, back, blocks.shape, ctx.together) if needs_blocks else None,
            None,
        )


def rotated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    """Return `x @ (weight @ blockdiag(blocks)).T + bias`, keeping x, the weight and the blocks only.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        blocks: (N, b, b) with N b = in.
    """
    dtype = autocast_dtype(x)
    x, weight, blocks = x.to(dtype), weight.to(dtype), blocks.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    together = _merging(x.numel() // x.shape[-1], blocks.shape)
    return applied(_RotatedLinear, x, weight, bias, blocks, together)


def block_gradients(x: Tensor, grad: Tensor, blocks: torch.Size, together: int | None = None) -> Tensor:
    """Return the gradients (N, rows, columns) of blocks for x (n, in) and a gradient (n, out)."""
    count, rows, columns = blocks
    together = _merging(len(x), blocks) if together is None else together
    groups = -(-count // together)
    grouped, inputs = _grouped(grad, groups, together * rows), _grouped(x, groups, together * columns)
    return _parted(grouped.mT @ inputs, blocks, together)


def block_diagonal(x: Tensor, blocks: Tensor, out: int) -> Tensor:
    """Return `x @ blockdiag(blocks).T`, keeping x and the blocks only.

    Args:
        x: (..., in); fewer channels than the blocks have columns crop the matrix.
        blocks: (N, rows, columns).
        out: at most N rows.
    """
    dtype = autocast_dtype(x)
    together = _merging(x.numel() // max(1, x.shape[-1]), blocks.shape)
    return applied(_BlockDiagonal, x.to(dtype), blocks.to(dtype), out, together)


def _cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """See the last axis as a matrix (rows, columns), contiguous: products of other strides are slow."""
    return x.reshape(-1, rows, columns).contiguous()


def _on_rows(matrix: Tensor, pieces: Tensor) -> Tensor:
    """Multiply every piece (n, b, c) from the left; `matmul` would exchange its axes for that."""
    return torch.bmm(matrix.expand(len(pieces), -1, -1), pieces)


class _Kronecker(torch.autograd.Function):
    """y = A X B^T for every token's X (b, d); X B^T is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, left, right)
        y = _on_rows(left, _cut(x, left.shape[1], right.shape[1]) @ right.T)
        return y.view(*x.shape[:-1], left.shape[0] * right.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right = ctx.saved_tensors
        grads = _cut(grad, left.shape[0], right.shape[0])
        back, grad_x = _on_rows(left.T, grads), None
        if ctx.needs_input_grad[0]:
            grad_x = (back @ right).view(x.shape)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return grad_x, None, None
        return grad_x, *kronecker_gradients(x, grads, left, right, back)


def kronecker_gradients(
    x: Tensor, grad: Tensor, left: Tensor, right: Tensor, back: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both matrices for x (..., b d) and a gradient (..., a c).

    Args:
        x: (..., b d).
        grad: (..., a c).
        left: (a, b).
        right: (c, d).
        back: A^T G (n, b, c), if it is there.
    """
    left, right = left.to(x.dtype), right.to(x.dtype)
    inputs, grads = _cut(x, left.shape[1], right.shape[1]), _cut(grad, left.shape[0], right.shape[0])
    back = _on_rows(left.T, grads) if back is None else back
    grad_left = torch.bmm(grads, (inputs @ right.T).mT).sum(0)
    return grad_left, back.flatten(0, 1).T @ inputs.flatten(0, 1)


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `x @ kron(left, right).T`, keeping x and the two matrices only.

    Args:
        x: (..., b d).
        left: (a, b).
        right: (c, d).
    """
    dtype = autocast_dtype(x)
    return applied(_Kronecker, *(t.to(dtype) for t in (x, left, right)))
