"""The result of a weighted low-rank approximation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidOption
from .factored import factored_svd


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix X = up down of rank at most r near a target T, chosen by L T R = U S V^T.

    Attributes:
        up: (m, r).
        down: (r, n).
        values: S of the selected terms (r,).
        left: U of the selected terms (m, r), orthonormal columns.
        right: V^T of the selected terms (r, n), orthonormal rows.
        spectrum: S, largest first: all min(m, n) of them (of factors min(m, k, n)), or with the randomised
            solver those of its range, of which none is above the true one.
        error: `||L (T - X) R||_F`.
        excess: estimated share by which the error is above the smallest possible; 0 when exact.
        solver: "exact", "randomised" or "factored": the one that gave this result.
        bias: (T - X) mean (m,), or None without a mean.
        balance: g (r,) such that the terms of `up g` and `down / g` carry equal weight; 0 for a term
            that is zero.
    """

    up: Tensor
    down: Tensor
    values: Tensor
    left: Tensor
    right: Tensor
    spectrum: Tensor
    error: float
    excess: float
    solver: str
    bias: Tensor | None
    balance: Tensor

    @property
    def rank(self) -> int:
        """Return r."""
        return self.values.numel()

    def matrix(self) -> Tensor:
        """Return X (m, n)."""
        return self.up @ self.down

    def split(
        self, scaling: float = 1.0, *, balance: Literal["metric", "product"] = "metric"
    ) -> tuple[Tensor, Tensor]:
        """Return B (m, r) and A (r, n) with scaling B A = X, the singular values split evenly between them.

            metric:   B = L^+ U (S/scaling)^(1/2),  A = (S/scaling)^(1/2) V^T R^+
            product:  X = u s v^T,  B = u (s/scaling)^(1/2),  A = (s/scaling)^(1/2) v^T

        Both are one without metrics. Only the second balances the factors, B^T B = A A^T, whatever the
        metrics; the first is the split of the papers that weigh (CorDA, FILA, EoRA). No inverse of a metric
        is taken; a term whose S is rounding is split by its norms.

        Args:
            scaling: the constant before the product, positive.
            balance: which singular values are split.

        Raises:
            InvalidOption: the scaling is not positive, or the balance unknown.
        """
        if not scaling > 0:
            raise InvalidOption(f"the scaling must be positive, not {scaling}")
        if balance == "metric":
            even = math.sqrt(scaling)
            inverse = torch.where(self.balance > 0, 1 / self.balance, 0)
            return self.up * (self.balance / even), (inverse / even)[:, None] * self.down
        if balance != "product":
            raise InvalidOption(f"balance must be 'metric' or 'product', not {balance!r}")
        left, values, right = self.svd()
        root = (values / scaling).sqrt()
        return left * root, root[:, None] * right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the singular triplets of X itself: orthonormal bases (m, r) and (r, n) of its ranges."""
        return factored_svd(self.up, self.down)


def tail_errors(spectrum: Tensor) -> Tensor:
    """Return the smallest error of every rank, `error[r] = sqrt(sum of S_i^2 over i > r)`, r = 0..k.

    Args:
        spectrum: S (..., k), complete, largest first.

    Returns:
        (..., k + 1); the first is the norm of the matrix, the last is 0.

    Example:
        >>> import torch
        >>> tail_errors(torch.tensor([4.0, 3.0]))
        tensor([5., 3., 0.])
    """
    squares = spectrum.square().flip(-1).cumsum(-1).flip(-1)
    return torch.cat([squares, torch.zeros_like(spectrum[..., :1])], -1).sqrt()
