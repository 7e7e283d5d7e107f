"""From the tensors that other tools store to one exact pair of factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import FormatError
from ..weights.kernels import at_least_float32

Pair = tuple[Tensor, Tensor]
_LARGEST = 2**31  # entries of one factor; no layer has more, and a small file of a Kronecker product may


def wide(tensor: Tensor) -> Tensor:
    """Return numbers in float32 or better.

    Raises:
        FormatError: they are not real numbers.
    """
    if not tensor.is_floating_point():
        raise FormatError(f"holds numbers of type {tensor.dtype}, which no factor has")
    return tensor.detach().to(at_least_float32(tensor))


def whole_pair(matrix: Tensor) -> Pair:
    """Return a matrix as a product with the identity on its shorter side."""
    rows, columns = matrix.shape
    eye = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    return (eye, matrix) if rows <= columns else (matrix, eye)


def plain(up: Tensor, down: Tensor) -> Pair:
    """Return the pair of a LoRA.

    Args:
        up: (out, r), or a pointwise kernel of that shape.
        down: (r, in), or a kernel (r, channels, *window), whose columns are the kernel's entries.
    """
    if up.shape[2:].numel() != 1:
        raise FormatError(f"has a second factor of shape {tuple(up.shape)}, which is no pointwise kernel")
    return wide(up).flatten(1), wide(down).flatten(1)


def tucker(core: Tensor, up: Tensor, down: Tensor) -> Pair:
    """Return the pair of a kernel in Tucker form.

        K[o, c, w] = sum_ij up[o, i] core[i, j, w] down[j, c]

    Args:
        core: (r, s, *window).
        up: (out, r).
        down: (s, channels).
    """
    if up.dim() != 2 or down.dim() != 2 or core.dim() < 2:
        raise FormatError(f"has a core {tuple(core.shape)} between {tuple(up.shape)} and {tuple(down.shape)}")
    _bound(core.shape[0], *core.shape[2:], down.shape[1])
    kernel = torch.einsum("ij...,jc->ic...", wide(core), wide(down))
    return wide(up), kernel.flatten(1)


def hadamard(first: Pair, second: Pair) -> Pair:
    """Return the entrywise product of two products as one pair of rank r s, the Khatri-Rao product.

    (U1 D1) * (U2 D2) = [U1[:, i] * U2[:, j]]_ij [D1[i] * D2[j]]_ij
    """
    (up, down), (other_up, other_down) = first, second
    rows, columns = up.shape[0], down.shape[1]
    if (rows, columns) != (other_up.shape[0], other_down.shape[1]):
        raise FormatError(f"has two products of shapes {_shape(first)} and {_shape(second)}")
    rank = up.shape[1] * other_up.shape[1]
    _bound(max(rows, columns), min(rank, rows, columns))
    if rank > min(rows, columns):
        return whole_pair((up @ down) * (other_up @ other_down))
    wide_up = torch.einsum("oi,oj->oij", up, other_up).flatten(1)
    return wide_up, torch.einsum("ic,jc->ijc", down, other_down).flatten(0, 1)


def kronecker(first: Pair, second: Pair) -> Pair:
    """Return the Kronecker product of two products as one pair: (U1 D1) x (U2 D2) = (U1 x U2) (D1 x D2)."""
    (up, down), (other_up, other_down) = first, second
    rows, columns = up.shape[0] * other_up.shape[0], down.shape[1] * other_down.shape[1]
    rank = up.shape[1] * other_up.shape[1]
    _bound(max(rows, columns), min(rank, rows, columns))
    if rank > min(rows, columns):
        return whole_pair(torch.kron(up @ down, other_up @ other_down))
    factors = [factor.contiguous() for factor in (up, other_up, down, other_down)]
    return torch.kron(*factors[:2]), torch.kron(*factors[2:])


def granular(down: Tensor, up: Tensor) -> Pair:
    """Return the k x k low-rank blocks of GraLoRA as one pair of rank k r.

        block (m, n) = sum_q up[m, n s + q] (x) down[n, :, m s + q],   s = r / k

    Args:
        down: (k, in / k, r).
        up: (k, r, out / k).
    """
    k, _, rank = down.shape
    if up.shape[:2] != (k, rank) or rank % k:
        raise FormatError(f"has blocks of shapes {tuple(up.shape)} and {tuple(down.shape)}")
    _bound(k * rank, k * max(up.shape[2], down.shape[1]))
    eye = torch.eye(k, dtype=down.dtype, device=down.device)
    blocks_up = wide(up).unflatten(1, (k, -1))  # (m, n, q, o)
    blocks_down = wide(down).unflatten(2, (k, -1))  # (n, i, m, q)
    rows = torch.einsum("mnqo,ml->molnq", blocks_up, eye).flatten(2).flatten(0, 1)
    columns = torch.einsum("nimq,nl->mnqli", blocks_down, eye).flatten(0, 2).flatten(1)
    return smallest(rows, columns)


def smallest(up: Tensor, down: Tensor) -> Pair:
    """Return a pair, or its product with the identity where that is smaller."""
    return whole_pair(up @ down) if up.shape[1] > min(up.shape[0], down.shape[1]) else (up, down)


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor, columns: bool = False) -> Pair:
    """Return the change that a direction and a magnitude make to a weight (DoRA).

        W' - W0 = m (W0 + dW) / |W0 + dW| - W0

    Args:
        weight: W0 (out, in).
        change: dW (out, in).
        magnitude: m, one number a row, in any shape; a column where `columns`. A column is one channel of a
            kernel, all of its window.
        columns: the norms are those of columns.
    """
    direction = weight.to(change.dtype) + change
    size = magnitude.numel()
    if columns:
        grouped = direction.reshape(direction.shape[0], size, -1)
        norms = torch.linalg.vector_norm(grouped, dim=(0, 2), keepdim=True)
        result = (wide(magnitude).reshape(1, size, 1) * grouped / norms).reshape(direction.shape)
    else:
        norms = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        result = wide(magnitude).reshape(direction.shape[0], 1) * direction / norms
    return whole_pair(result - weight.to(change.dtype))


def _shape(pair: Pair) -> tuple[int, int]:
    return pair[0].shape[0], pair[1].shape[1]


def _bound(*sizes: int) -> None:
    if math.prod(sizes) > _LARGEST:
        raise FormatError(f"would be a factor of {' x '.join(map(str, sizes))} entries, which no layer has")
