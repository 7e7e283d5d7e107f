"""Normal numbers by index, from a counter-based generator, and the low-rank noise of a generation."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .seeds import hashed

Low = tuple[Tensor, Tensor]  # A (pairs, out, r) and B (pairs, in, r)
_BLOCK = 4  # words that the generator gives for each value of its counter


def normals(seed: int, start: int, count: int, size: int) -> Tensor:
    """Return `count` vectors of `size` normal numbers, the ones with the indices from `start` on.

    A vector depends on the seed and its index only (Philox counters, the Box-Muller transform), so a part of
    the population draws the same numbers as all of it, on every device.

    Example:
        >>> torch.equal(normals(0, 0, 8, 3)[5:], normals(0, 5, 3, 3))
        True
    """
    words = 2 * math.ceil(size / 2)
    ticks = math.ceil(words / _BLOCK)
    stream = np.random.Philox(key=seed, counter=start * ticks)
    raw = stream.random_raw(count * ticks * _BLOCK).reshape(count, -1)[:, :words]
    uniform = ((raw >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53  # in (0, 1]
    radius, angle = np.sqrt(-2 * np.log(uniform[:, ::2])), 2 * np.pi * uniform[:, 1::2]
    drawn = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :size]
    return torch.from_numpy(drawn.astype(np.float32))


class Noise:
    """The random numbers of a generation, by parameter.

    Args:
        seed: of the run and the generation.
        rank: r, of perturbations of matrices.
        names: of parameters, by identity.
    """

    def __init__(self, seed: int, rank: int, names: dict[int, str]) -> None:
        self.seed, self.rank, self.names = seed, rank, names

    def factors(self, parameter: Tensor, pairs: range) -> Low:
        """Return A (pairs, out, r) and B (pairs, in, r) of a matrix; kernels are (out, in * window)."""
        rows = len(parameter)
        columns = parameter.numel() // rows
        drawn = self._drawn(parameter, pairs, (rows + columns) * self.rank)
        left, right = drawn.split([rows * self.rank, columns * self.rank], 1)
        return left.view(-1, rows, self.rank), right.view(-1, columns, self.rank)

    def vector(self, parameter: Tensor, pairs: range) -> Tensor:
        """Return (pairs, length) for a vector."""
        return self._drawn(parameter, pairs, parameter.numel())

    def _drawn(self, parameter: Tensor, pairs: range, size: int) -> Tensor:
        seed = hashed(self.seed, self.names[id(parameter)])
        return normals(seed, pairs.start, len(pairs), size).to(parameter.device, parameter.dtype)
