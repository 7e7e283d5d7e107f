"""How far a merge went from where it started: two norms, summed piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of a piece: what is computed of one stays in the caches.
PIECE = 2**17


@dataclass
class Norms:
    """The squares of |th0| and |th* - th0|.

    Example:
        >>> norms = Norms()
        >>> norms.add(torch.tensor([3.0, 6.0]), torch.tensor([3.0, 2.0]))
        True
        >>> norms.ratio
        1.1094...
    """

    origin: float = 0.0
    moved: float = 0.0

    def add(self, tensor: Tensor, origin: Tensor) -> bool:
        """Add a piece of th* and of th0, both flat; return whether both are finite, and their squares too."""
        moved = tensor - origin
        self.origin += float(torch.dot(origin, origin))
        self.moved += float(torch.dot(moved, moved))
        return self.are_finite

    @property
    def are_finite(self) -> bool:
        """Whether both are."""
        return math.isfinite(self.origin + self.moved)

    @property
    def ratio(self) -> float:
        """|th* - th0| / |th0|, or |th* - th0| where th0 is zero."""
        return math.sqrt(self.moved / self.origin if self.origin else self.moved)


def norms(tensor: Tensor, origin: Tensor) -> Norms:
    """Return the norms of a merged tensor, without a third tensor of its size."""
    found = Norms()
    for new, old in zip(tensor.reshape(-1).split(PIECE), origin.reshape(-1).split(PIECE), strict=True):
        found.add(new, old)
    return found
