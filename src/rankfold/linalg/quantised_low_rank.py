"""A matrix as a coarse one plus a product of low rank, found in turns (LQ-LoRA, LoftQ).

    W ~ Q + X,   Q in a format of few bits,   X of rank r,   error e = ||F^(1/2) . (W - Q - X)||_F
    lq (Guo et al. 2023):      X_t = [W - Q_(t-1)]_r,  Q_t = NF(W - X_t),   Q_0 = 0
    loftq (Li et al. 2023):    Q_t = NF(W - X_(t-1)),  X_t = [W - Q_t]_r,   X_0 = 0

Neither has a limit that it reaches: each turn is repeated while it lowers the error. With entrywise weights
F the product is found under diag(sqrt(mean_j F_ij)) and diag(sqrt(mean_i F_ij)), which is exact where F is
an outer product; the format is not weighed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidOption
from .checks import require_matrix, require_rank
from .lowrank import LowRank
from .metrics import Diagonal
from .normal_float import NormalFloat, dequantise, quantise
from .weighted import weighted_low_rank

FLOOR = 1e-3  # of the largest weight of a row or column, so that none is free
POWER = 2  # iterations of the randomised decomposition, as in the official code


@dataclass(frozen=True, eq=False)
class QuantisedLowRank:
    """A matrix near `dequantise(tensors) + up down`.

    Attributes:
        tensors: of the format, by name.
        up, down: (m, r) and (r, n); the scaling times their product is X.
        errors: of every turn up to the one that is given, each below the one before.
        size: of the matrix in the same norm.
    """

    tensors: Mapping[str, Tensor]
    up: Tensor
    down: Tensor
    errors: tuple[float, ...]
    size: float

    @property
    def error(self) -> float:
        """The smallest error found."""
        return self.errors[-1]


@torch.no_grad()
def quantised_low_rank(
    matrix: Tensor,
    rank: int,
    form: NormalFloat,
    *,
    weights: Tensor | None = None,
    scaling: float = 1.0,
    order: Literal["lq", "loftq"] = "lq",
    iterations: int = 100,
    solver: Literal["exact", "randomised"] = "exact",
    generator: torch.Generator | None = None,
    first: LowRank | None = None,
) -> QuantisedLowRank:
    """Return a matrix in a format of few bits and factors whose sum is near a matrix.

    Args:
        matrix: W (m, n).
        rank: r, from 0, which leaves the format alone, to min(m, n).
        form: of the coarse matrix.
        weights: F >= 0 (m, n), of the entries' squared errors; None weighs all alike.
        scaling: s > 0 of s B A = X; the singular values are split evenly.
        order: what comes first, the product ("lq") or the format ("loftq").
        iterations: turns at most; the first that does not lower the error ends them, and is not kept.
        solver: "exact", or "randomised" with two power iterations.
        generator: of the randomised solver.
        first: what `low_rank_part` finds for the matrix, where it is known and the product comes first.

    Raises:
        InvalidRank: the rank is not in 0..min(m, n).
        InvalidOption: NaN or infinite entries, weights of another shape or below zero, unknown words.

    Example:
        >>> matrix = torch.outer(torch.arange(1.0, 9), torch.ones(8))
        >>> found = quantised_low_rank(matrix, 1, NormalFloat(2, 8, None))
        >>> found.error < 1e-5
        True
    """
    _check(matrix, rank, weights, order, iterations)
    decompose = low_rank_part(rank, weights, solver, generator)
    turns = _turns(matrix, form, order, decompose, first)
    best, errors = next(turns), list[float]()
    for turn in itertools.chain([best], itertools.islice(turns, iterations - 1)):
        error = _size(matrix - turn.coarse - turn.product(), weights)
        if errors and error >= errors[-1]:
            break
        best = turn
        errors.append(error)
    up, down = _no_factors(matrix) if best.low is None else best.low.split(scaling)
    return QuantisedLowRank(best.tensors, up, down, tuple(errors), _size(matrix, weights))


@dataclass(frozen=True, eq=False)
class _Turn:
    """What a turn leaves: the tensors of Q, Q itself, and X or None for zero."""

    tensors: Mapping[str, Tensor]
    coarse: Tensor
    low: LowRank | None

    def product(self) -> Tensor | float:
        return _product(self.low)


def _product(low: LowRank | None) -> Tensor | float:
    return 0.0 if low is None else low.matrix()


Decompose = Callable[[Tensor], LowRank | None]


def _turns(
    matrix: Tensor, form: NormalFloat, order: str, decompose: Decompose, first: LowRank | None
) -> Iterator[_Turn]:
    """Yield turn after turn, without end."""

    def coded(rest: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        tensors = quantise(rest, form)
        return tensors, dequantise(tensors, form, tuple(rest.shape), rest.dtype).to(rest)

    low = (first or decompose(matrix)) if order == "lq" else None
    while True:
        tensors, coarse = coded(matrix - _product(low))
        if order == "lq":
            yield _Turn(tensors, coarse, low)
            low = decompose(matrix - coarse)
        else:
            low = decompose(matrix - coarse)
            yield _Turn(tensors, coarse, low)


def low_rank_part(
    rank: int,
    weights: Tensor | None = None,
    solver: Literal["exact", "randomised"] = "exact",
    generator: torch.Generator | None = None,
) -> Decompose:
    """Return what finds the product of rank r nearest to a matrix, where entries have these weights.

    Args:
        rank: r; 0 always finds None, the product that is zero.
        weights: F >= 0 (m, n), or None; weights that are all zero weigh all alike.
        solver: "exact" or "randomised".
        generator: of the randomised solver.
    """
    left, right = (None, None) if weights is None or not bool(weights.any()) else _metrics(weights)
    turns = POWER if solver == "randomised" else None

    def decompose(matrix: Tensor) -> LowRank | None:
        if not rank:
            return None
        return weighted_low_rank(
            matrix, rank, left=left, right=right, solver=solver, iterations=turns, generator=generator
        )

    return decompose


def _metrics(weights: Tensor) -> tuple[Diagonal, Diagonal]:
    left, right = (weights.mean(axis).sqrt() for axis in (1, 0))
    return Diagonal(left.clamp(min=FLOOR * left.max())), Diagonal(right.clamp(min=FLOOR * right.max()))


def _size(matrix: Tensor, weights: Tensor | None) -> float:
    """Return ||F^(1/2) . matrix||_F."""
    return float((matrix if weights is None else matrix * weights.sqrt()).norm())


def _no_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1])


def _check(matrix: Tensor, rank: int, weights: Tensor | None, order: str, iterations: int) -> None:
    require_matrix(matrix, "the matrix")
    if rank:
        require_rank(rank, min(matrix.shape))
    if weights is not None and (weights.shape != matrix.shape or not bool((weights >= 0).all())):
        raise InvalidOption(
            f"weights of shape {tuple(weights.shape)} must be numbers of at least 0 for every entry of a "
            f"matrix of shape {tuple(matrix.shape)}"
        )
    if order not in ("lq", "loftq") or iterations < 1:
        raise InvalidOption(
            f"order must be 'lq' or 'loftq' and iterations at least 1, not {order!r} and {iterations}"
        )
