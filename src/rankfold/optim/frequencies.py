"""The discrete cosine transform: its matrix, and how large a gradient is along every cosine."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_FAST = 256  # rows from which on a fast transform takes less time than a product; measured with float32
_CHUNK = 2**18  # entries that are transformed at a time, so that they stay in the processor's cache


@lru_cache(maxsize=32)
def cosines(size: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
    """Return the orthonormal DCT-II matrix C (d, d): row k is a cosine of frequency k; one for all who ask.

    Example:
        >>> matrix = cosines(5)
        >>> bool(torch.allclose(matrix @ matrix.T, torch.eye(5, dtype=torch.float64)))
        True
    """
    place = torch.arange(size, dtype=torch.float64)
    matrix: Tensor = torch.cos(torch.pi / size * place[:, None] * (place + 0.5)) * math.sqrt(2 / size)
    matrix[0] *= 0.5**0.5
    return matrix.to(device, dtype)


def cosine_scores(matrix: Tensor, norm: str = "l2") -> Tensor:
    """Return the squared l2 or the l1 norms of the rows of C G, (d,), for a matrix G (d, n).

    From 256 rows on by a fast transform (Makhoul 1980), which forms C G a piece at a time.

    Example:
        >>> scores = cosine_scores(torch.ones(300, 2))
        >>> int(scores.argmax()), round(float(scores[0]))
        (0, 600)
    """
    if len(matrix) < _FAST:
        return _size(cosines(len(matrix), matrix.dtype, matrix.device) @ matrix, norm, 1)
    pieces = matrix.T.split(max(1, _CHUNK // len(matrix)))
    halves = torch.stack([_size(torch.view_as_real(_transformed(each)), norm, 0) for each in pieces]).sum(0)
    # The imaginary part of frequency k is that of d - k; those of 0 and of d / 2 are there twice.
    backward = halves[1 : (len(matrix) + 1) // 2, 1].flip(0)
    return torch.cat([halves[:, 0], backward])


def _size(values: Tensor, norm: str, axis: int) -> Tensor:
    return values.square().sum(axis) if norm == "l2" else values.abs().sum(axis)


def _transformed(rows: Tensor) -> Tensor:
    """Return coefficients of rows (m, d): cosines k up to d / 2, and those of d - k as imaginary parts."""
    order, turn = _makhoul(rows.shape[1], rows.dtype, rows.device)
    found: Tensor = torch.fft.rfft(rows.index_select(1, order).contiguous())
    return found.mul_(turn)


@lru_cache(maxsize=32)
def _makhoul(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the order in which entries are transformed, and what every frequency is multiplied by."""
    place = torch.arange(size, device=device)
    order = torch.cat([place[::2], place[1::2].flip(0)])
    turn = torch.arange(size // 2 + 1, dtype=torch.float64, device=device) * (-torch.pi / (2 * size))
    factor = torch.polar(torch.full_like(turn, math.sqrt(2 / size)), turn)
    factor[0] *= 0.5**0.5
    return order, factor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
