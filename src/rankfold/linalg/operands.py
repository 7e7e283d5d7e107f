"""The two forms of a target: a matrix, and a product of factors that is never multiplied out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..errors import InvalidOption
from .checks import exact_dtype, require_matrix
from .factored import factored_svd
from .metrics import after, before

Target = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class DenseOperand:
    """A target given as a matrix T (m, n)."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def like(self) -> Tensor:
        """Return a tensor of its dtype and device."""
        return self.matrix

    @property
    def size(self) -> int:
        """Return how many singular triplets it has."""
        return min(self.shape)

    def weighed(self, left: Tensor | None, right: Tensor | None) -> Self:
        """Return L T R."""
        return type(self)(after(before(left, self.matrix), right))

    def onto(self, columns: Tensor) -> Tensor:
        """Return T times columns (n, r)."""
        return self.matrix @ columns

    def under(self, rows: Tensor) -> Tensor:
        """Return rows (r, m) times T."""
        return rows @ self.matrix

    def without_range(self, basis: Tensor) -> Self:
        """Return (I - Q Q^T) T."""
        return type(self)(self.matrix - basis @ (basis.T @ self.matrix))

    def transposed(self) -> Self:
        """Return T^T."""
        return type(self)(self.matrix.T)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all singular triplets."""
        left, values, right = torch.linalg.svd(self.matrix, full_matrices=False)
        return left, values, right


@dataclass(frozen=True, eq=False)
class FactoredOperand:
    """A target given as a product T = up (m, k) down (k, n)."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def like(self) -> Tensor:
        """Return a tensor of its dtype and device."""
        return self.up

    @property
    def size(self) -> int:
        """Return how many singular triplets can differ from zero."""
        return min(self.shape[0], self.down.shape[0], self.shape[1])

    def weighed(self, left: Tensor | None, right: Tensor | None) -> Self:
        """Return L T R."""
        return type(self)(before(left, self.up), after(self.down, right))

    def onto(self, columns: Tensor) -> Tensor:
        """Return T times columns (n, r)."""
        return self.up @ (self.down @ columns)

    def under(self, rows: Tensor) -> Tensor:
        """Return rows (r, m) times T."""
        return (rows @ self.up) @ self.down

    def without_range(self, basis: Tensor) -> Self:
        """Return (I - Q Q^T) T."""
        return type(self)(self.up - basis @ (basis.T @ self.up), self.down)

    def transposed(self) -> Self:
        """Return T^T."""
        return type(self)(self.down.T, self.up.T)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all singular triplets."""
        return factored_svd(self.up, self.down)


Operand = DenseOperand | FactoredOperand


def as_operand(target: Target, dtype: torch.dtype | None = None) -> Operand:
    """Return a target in the form that its type names.

    Args:
        target: a matrix (m, n), or (up (m, k), down (k, n)).
        dtype: to compute in; None keeps the target's, at least float32.

    Raises:
        InvalidOption: a part is not a finite matrix, or the factors do not meet.
    """
    if isinstance(target, Tensor):
        return DenseOperand(require_matrix(target, "the target").to(dtype or exact_dtype(target)))
    up, down = (require_matrix(part, "a factor of the target") for part in target)
    if up.shape[1] != down.shape[0]:
        raise InvalidOption(f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not multiply")
    dtype = dtype or exact_dtype(up, down)
    return FactoredOperand(up.to(dtype), down.to(dtype))
