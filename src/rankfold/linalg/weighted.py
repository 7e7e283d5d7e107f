"""One weighted low-rank approximation, for every method that is one.

    X = argmin over rank r of ||L (T - X) R||_F,      L T R = U S V^T

PiSSA and MiLoRA (no metric), FWSVD and FILA (L diagonal), ASVD (R diagonal), SVD-LLM and EoRA (R the root of
a Gram matrix), CorDA (R the Gram matrix itself), Kronecker-factored Fisher weights (both sides) differ in T,
L, R and in which terms they keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidOption
from .checks import null_level, precise_dtype, require_finite, require_indices, require_rank
from .lowrank import LowRank
from .metrics import Gram, Metric, RootGram, after, before, damped, psd_root
from .operands import DenseOperand, Operand, Target, as_operand
from .svd import column_signs, completed_basis
from .terms import Terms, exact_terms, randomised_terms


@torch.no_grad()
def gram_low_rank(
    target: Tensor, rank: int, gram: Tensor | None = None, *, damping: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U_r, U_r^T T and all singular values of M = T C^(1/2), from the smaller of its Gram matrices.

        m <= n:   M M^T = T C T^T = U S^2 U^T
        m > n:    M^T M = V S^2 V^T,   U_r = the orthonormal basis of M V_r
        X = U_r U_r^T T,   ||(T - X) C^(1/2)|| = sqrt(sum of S_i^2 over i > r)

    No singular value decomposition of M is taken, and of a wide matrix no C^(1/2) either, so that this is
    several times faster than `weighted_low_rank`. Singular values below the root of the rounding, relative to
    the largest, are lost.

    Args:
        target: T (m, n), float32 or better.
        rank: r, 1..min(m, n).
        gram: C (n, n), or None for the identity.
        damping: d >= 0, C becomes C + d mean(diag C) I.

    Raises:
        InvalidRank: the rank is not in 1..min(m, n).

    Example:
        >>> import torch
        >>> up, down, values = gram_low_rank(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1)
        >>> (up @ down).round(), values[:1]
        (tensor([[3., 4.],
                [0., 0.]]), tensor([5.]))
    """
    require_rank(rank, min(target.shape), "the number of terms")
    if target.shape[0] <= target.shape[1]:
        weighed = target if gram is None else target @ damped(gram, damping).to(target)
        squares, vectors = torch.linalg.eigh(weighed @ target.T)
        up = vectors.flip(1)[:, :rank]
    else:
        weighed = target if gram is None else target @ psd_root(gram, damping=damping).to(target)
        squares, vectors = torch.linalg.eigh(weighed.T @ weighed)
        up = torch.linalg.qr(weighed @ vectors.flip(1)[:, :rank]).Q
    up = up * column_signs(up)
    return up, up.T @ target, squares.flip(0).clamp(min=0).sqrt()


Select = Literal["top", "bottom"] | Tensor | Sequence[int]


@torch.no_grad()
def weighted_low_rank(
    target: Target,
    rank: int | None,
    *,
    left: Metric | None = None,
    right: Metric | None = None,
    select: Select = "top",
    solver: Literal["exact", "randomised"] = "exact",
    iterations: int | None = None,
    tolerance: float | None = None,
    damping: float = 0.0,
    generator: torch.Generator | None = None,
    mean: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> LowRank:
    """Return the terms of a matrix that matter most (or least, or those named) under two metrics.

        L T R = U S V^T,   I = the selected terms
        L = R = 1:   X = U_I S_I V_I^T
        L = 1:       X = U_I (U_I^T T)
        R = 1:       X = (T V_I) V_I^T
        both:        X = (T R V_I) S_I^-1 (U_I^T L T)

    Each is L^-1 U_I S_I V_I^T R^-1 where the metrics can be inverted, and none inverts one. Where they cannot
    and there is one metric, a direction of weight zero keeps what T projected on U_I (or V_I) does there, and
    terms beyond the rank of L T R are the largest ones of what remains of T, so that all min(m, n) terms
    together are always T. With two metrics, a term whose S is zero to rounding is zero. The error is the
    smallest possible in either case.

    Args:
        target: T (m, n), or the factors (up (m, k), down (k, n)) of a product, which is never formed.
        rank: number of terms; None where `select` names them.
        left: metric of the rows; None is the identity.
        right: metric of the columns; None is the identity.
        select: "top", "bottom" (of the min(m, n) terms, of factors min(m, k, n)), a mask over the terms, or
            their indices, 0 the largest.
        solver: "exact"; or "randomised", for the top terms of a matrix: a range oversampled by max(10, r)
            (Halko et al. 2011). Factors are always solved exactly, through QR.
        iterations: power steps of the randomised solver, 4 unless told.
        tolerance: largest accepted `excess` of a randomised result; above it the exact one is computed.
            None accepts any. The excess estimates, from the residuals of the triplets, by what share
            the error is above the smallest possible; it holds when the range met every leading direction,
            which a random one does with a probability that grows quickly with the power steps.
        damping: d >= 0. Gram matrices become C + d mean(diag C) I, diagonals d_i + d mean|d_i|.
        generator: of the random range, drawn from on the CPU.
        mean: mean of the inputs (n,); gives `bias` = (T - X) mean, which added to the outputs of X makes
            their mean error zero. (The centred covariance as metric then gives the smallest error.)
        dtype: to compute in. None takes float64 with a Gram metric, whose condition it must bear, where the
            device has it, and the target's own (at least float32) otherwise.

    Returns:
        Factors, values and error, in the target's dtype, at least float32. Signs as in `truncated_svd`, of U.

    Raises:
        InvalidRank: the rank is not in 1..min(m, n).
        InvalidOption: NaN or infinite entries, a metric of another size, not symmetric or indefinite, a
            selection out of range, a randomised solver asked for other terms than the top ones.

    Example:
        >>> import torch
        >>> weight, inputs = torch.eye(3), torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
        >>> near = weighted_low_rank(weight, 1, right=RootGram(inputs.T @ inputs))
        >>> near.matrix().round().abs()
        tensor([[0., 0., 0.],
                [0., 1., 0.],
                [0., 0., 0.]])
        >>> round(near.error, 4)
        1.0
    """
    if damping < 0:
        raise InvalidOption(f"damping must be at least 0, not {damping}")
    if solver not in ("exact", "randomised"):
        raise InvalidOption(f"solver must be 'exact' or 'randomised', not {solver!r}")
    if solver == "randomised" and not (isinstance(select, str) and select == "top"):
        raise InvalidOption("the randomised solver finds the top terms alone; take solver='exact' for others")
    given = as_operand(target)
    operand = as_operand(target, dtype or _dtype(given, left, right))
    chosen = _chosen(select, rank, operand)
    forms = _form(left, operand.shape[0], damping, operand), _form(right, operand.shape[1], damping, operand)
    weighed = operand.weighed(*forms)
    if solver == "randomised" and isinstance(weighed, DenseOperand):
        terms = randomised_terms(weighed, len(chosen), iterations, tolerance, generator)
    else:
        terms = exact_terms(weighed, chosen)
    up, down, balance = _factors(operand, forms, terms, chosen)
    return LowRank(
        up=up.to(given.like),
        down=down.to(given.like),
        values=terms.values[chosen].to(given.like),
        left=terms.left[:, chosen].to(given.like),
        right=terms.right[chosen].to(given.like),
        spectrum=terms.values.to(given.like),
        error=terms.error,
        excess=terms.excess,
        solver=terms.solver,
        bias=None if mean is None else _bias(operand, up, down, mean).to(given.like),
        balance=balance.to(given.like),
    )


def _dtype(given: Operand, *metrics: Metric | None) -> torch.dtype:
    exact = any(isinstance(metric, Gram | RootGram) for metric in metrics)
    return precise_dtype(given.like) if exact else given.like.dtype


def _form(metric: Metric | None, size: int, damping: float, operand: Operand) -> Tensor | None:
    return None if metric is None else metric.form(size, damping, operand.like)


def _chosen(select: Select, rank: int | None, operand: Operand) -> Tensor:
    """Return the indices of the selected terms."""
    size, device = operand.size, operand.like.device
    if isinstance(select, str):
        if select not in ("top", "bottom") or rank is None:
            raise InvalidOption(
                f"select {select!r} with rank {rank}: give 'top' or 'bottom' and a rank, or indices"
            )
        require_rank(rank, size, "the number of terms")
        start = 0 if select == "top" else size - rank
        return torch.arange(start, start + rank, device=device)
    indices = torch.as_tensor(select, device=device)
    if indices.dtype == torch.bool:
        if indices.shape != (size,):
            raise InvalidOption(f"a mask of shape {tuple(indices.shape)} does not fit {size} terms")
        indices = indices.nonzero()[:, 0]
    require_indices(indices, size, "the selected terms")
    if rank not in (None, len(indices)):
        raise InvalidOption(f"rank {rank} is not the number of selected terms, {len(indices)}")
    return indices


def _factors(
    operand: Operand, forms: tuple[Tensor | None, Tensor | None], terms: Terms, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return up, down and the balance of the selected terms."""
    left, right = forms
    level = null_level(terms.values, max(operand.shape))
    values, alive = terms.values[chosen], terms.values[chosen] > level
    root = values.sqrt()
    if left is None and right is None:
        up, down = terms.left[:, chosen], values[:, None] * terms.right[chosen]
    elif left is None:
        up, down = _projected(operand, terms.left, int((terms.values > level).sum()), chosen)
    elif right is None:
        coright, coleft = _projected(
            operand.transposed(), terms.right.T, int((terms.values > level).sum()), chosen
        )
        up, down, root = coleft.T, coright.T, root.reciprocal()
    else:
        up = operand.onto(before(right, terms.right[chosen].T)) * torch.where(alive, 1 / values, 0)
        down = operand.under(after(terms.left[:, chosen].T, left))
    return up, down, torch.where(alive, root, _even(up, down))


def _projected(operand: Operand, basis: Tensor, alive: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return U_I and U_I^T T, the directions beyond the alive ones being the largest of the rest."""
    if int(chosen.max()) >= alive:
        rest = operand.without_range(basis[:, :alive]).svd()[0]
        basis = completed_basis(basis[:, :alive], rest[:, : basis.shape[1] - alive])
    up = basis[:, chosen]
    return up, operand.under(up.T)


def _even(up: Tensor, down: Tensor) -> Tensor:
    """Return the factor of every term that makes its two norms equal, 0 where one is zero."""
    tall, wide = up.norm(dim=0), down.norm(dim=1)
    return torch.where((tall > 0) & (wide > 0), wide / tall, 0).sqrt()


def _bias(operand: Operand, up: Tensor, down: Tensor, mean: Tensor) -> Tensor:
    """Return (T - X) mean."""
    if mean.shape != (operand.shape[1],):
        raise InvalidOption(f"a mean of shape {tuple(mean.shape)} needs {operand.shape[1]} entries")
    column = require_finite(mean, "the mean of the inputs").to(up)[:, None]
    return (operand.onto(column) - up @ (down @ column))[:, 0]
