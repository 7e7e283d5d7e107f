"""Rotations of a weight's inputs by blocks, which the orthogonal structures share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidOption
from ..weights import BlockDiagonal, Cayley, Weight
from .site import Site


def block_size_of(site: Site, wanted: int, method: str, multiple: int = 1) -> int:
    """Return the largest size, at most `wanted` and a multiple of `multiple`, that divides the inputs.

    Raises:
        InvalidOption: no block of two inputs or more fits.
    """
    columns = site.shape[1]
    fits = [b for b in range(2, min(wanted, columns) + 1) if columns % b == 0 and b % multiple == 0]
    if not fits:
        raise InvalidOption(
            f"{site.path}: {method} cannot cut {columns} inputs into blocks of 2 to {wanted}"
            f"{' of even size' if multiple == 2 else ''}; choose another block_size or leave the layer out"
        )
    return max(fits)


def rotation(site: Site, size: int, name: str) -> Weight:
    """Return a block-diagonal rotation of the inputs that starts at the identity."""
    numbers = site.trained(site.zeros(site.shape[1] // size, size * (size - 1) // 2), name)
    return BlockDiagonal(Cayley(numbers, size, f"{name}.rotations"))


def butterfly(columns: int, half: int, level: int) -> Tensor:
    """Return the order of inputs in which half blocks that stand 2^level apart are neighbours."""
    chunks = torch.arange(columns).view(-1, 2, 2**level, half)
    return chunks.transpose(1, 2).flatten()
