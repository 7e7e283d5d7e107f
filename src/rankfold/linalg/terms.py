"""The singular triplets behind a weighted approximation, exact and randomised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidOption
from .checks import null_level
from .operands import DenseOperand, Operand
from .svd import column_signs, randomised_svd

# Measured on 768 x 768 at rank 16: spectra 1/i, i^-1/2 and i^-1/4 end 1e-7, 2e-5 and 2e-4 above the
# smallest error.
ITERATIONS = 4


@dataclass(frozen=True, eq=False)
class Terms:
    """Triplets of L T R.

    Attributes:
        left: U (m, c).
        values: S (c,).
        right: V^T (c, n).
        error: `||L T R - the kept terms||_F`.
        excess: by what share the error may be above the smallest possible.
        solver: which one gave them.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    error: float
    excess: float
    solver: str


def exact_terms(weighed: Operand, chosen: Tensor) -> Terms:
    """Return all triplets; the error is that of keeping the chosen ones."""
    left, values, right = weighed.svd()
    signs = column_signs(left)
    rest = torch.ones_like(values).index_fill(0, chosen, 0)
    solver = "exact" if isinstance(weighed, DenseOperand) else "factored"
    return Terms(left * signs, values, right * signs.T, float((values * rest).norm()), 0.0, solver)


def randomised_terms(
    weighed: DenseOperand,
    rank: int,
    iterations: int | None,
    tolerance: float | None,
    generator: torch.Generator | None,
) -> Terms:
    """Return the top triplets from a random range, or the exact ones if their excess is above tolerance."""
    if iterations is not None and iterations < 0:
        raise InvalidOption(f"iterations must be at least 0, not {iterations}")
    matrix = weighed.matrix
    left, values, right = randomised_svd(
        matrix, rank, iterations=ITERATIONS if iterations is None else iterations, generator=generator
    )
    remainder = matrix - left[:, :rank] * values[:rank] @ right[:rank]
    error, excess = float(remainder.norm()), _excess(remainder, values, right[:rank])
    if tolerance is not None and excess > tolerance:
        return exact_terms(weighed, torch.arange(rank, device=matrix.device))
    signs = column_signs(left)
    return Terms(left * signs, values, right * signs.T, error, excess, "randomised")


def _excess(remainder: Tensor, values: Tensor, right: Tensor) -> float:
    """Return by what share the norm of the remainder M - U S V^T may be above the smallest possible.

    With rho_i = |remainder v_i|, the off-diagonal block of M M^T in the bases of U and its complement has the
    columns S_i rho_i. Rotating it away moves energy of at most S_i rho_i into term i, and of about
    (S_i rho_i)^2 / (S_i^2 - S_{r+1}^2) where there is a gap.
    """
    rank = len(right)
    coupling = values[:rank] * (remainder @ right.T).norm(dim=0)
    following = values[rank] if len(values) > rank else torch.zeros_like(values[0])
    gap = (values[:rank].square() - following.square()).clamp(min=torch.finfo(values.dtype).tiny)
    gained = (coupling * (coupling / gap).clamp(max=1)).sum()
    energy = remainder.square().sum()
    rounding = null_level(values, max(remainder.shape)).square().sum()
    if energy <= rounding:
        return 0.0
    return float((energy / (energy - gained).clamp(min=rounding)).sqrt() - 1)
