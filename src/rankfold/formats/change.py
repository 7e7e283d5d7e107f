"""The change that an expression makes to its base, as exact low-rank factors where it has them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import (
    Base,
    Diagonal,
    Dropped,
    Grid,
    Moved,
    Normalized,
    Product,
    Reflections,
    Scaled,
    Sum,
    Weight,
)

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def exact_change(expression: Weight) -> Pair | None:
    """Return `(up, down)` with `expression = W0 + up @ down` exactly, or None where no such pair is small.

    Args:
        expression: of an adapted weight, in evaluation.

    Returns:
        up (out, r) and down (r, in), in float32 or better.
    """
    if isinstance(expression, Product) and isinstance(expression.factors[0], Base):
        return _reflected(expression)
    if not isinstance(expression, Sum):
        return None
    terms = list(expression.parts())
    if not _is_stored(terms[0]):
        return None
    pairs = [pair for pair in map(_pair, terms[1:]) if pair is not None]
    if len(pairs) < len(terms) - 1:
        return None
    return torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs], 0)


def _pair(term: Weight) -> Pair | None:
    if isinstance(term, Scaled):
        inner = _pair(term.inner)
        return None if inner is None else (inner[0] * term.factor(), inner[1])
    if isinstance(term, Dropped):
        return _pair(term.inner)
    if isinstance(term, Grid):
        return _grid_pair(term)
    # Two factors are a pair whatever their rank; more are one only where that makes them smaller.
    if isinstance(term, Product) and (len(term.factors) == 2 or term.rank() <= min(term.shape)):
        return _product_pair(term)
    pair = term.factored()
    if pair is None or pair[0].shape[1] > min(term.shape):
        return None
    return _wide(pair[0]), _wide(pair[1])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _product_pair(product: Product) -> Pair:
    """Multiply a product out from its ends to its narrowest place."""
    factors: list[Weight] = list(product.factors)
    inner = [factor.shape[1] for factor in factors[:-1]]
    cut = len(inner) - inner[::-1].index(min(inner))
    return _chained(factors[:cut]), _chained(factors[cut:])


def _chained(factors: list[Weight]) -> Tensor:
    """Multiply out; a diagonal scales rows or columns, and only alone is it formed."""
    if len(factors) == 1:
        return _wide(factors[0].dense())
    result: Tensor | None = None
    scales: Tensor | None = None  # of the rows, while only diagonals have come
    for factor in factors:
        diagonal = _wide(factor.vector.tensor()) if isinstance(factor, Diagonal) else None
        if result is None and diagonal is not None:
            scales = diagonal if scales is None else scales * diagonal
        elif result is None:
            dense = _wide(factor.dense())
            result = dense if scales is None else scales[:, None] * dense
        else:
            result = result * diagonal if diagonal is not None else result @ _wide(factor.dense())
    return torch.diag(scales) if result is None else result  # type: ignore[arg-type]


def _grid_pair(grid: Grid) -> Pair:
    """Write k x k blocks of rank q as one pair of rank k^2 q."""
    k = grid.grid
    up = _wide(grid.up.tensor()).unflatten(2, (k, -1))
    down = _wide(grid.down.tensor()).unflatten(1, (k, -1))
    rank, eye = up.shape[-1], torch.eye(k, dtype=up.dtype, device=up.device)
    wide = torch.einsum("jonq,jm->jomnq", up, eye)  # row block j, then rank index (output block m = j, n, q)
    tall = torch.einsum("njqi,nm->jnqmi", down, eye)  # rank index (j, n, q), then column block m = n
    return wide.reshape(grid.shape[0], k * k * rank), tall.reshape(k * k * rank, grid.shape[1])


def _reflected(product: Product) -> Pair | None:
    """W0 H - W0 = -(W0 V) T V^T."""
    base, *rest = list(product.factors)
    if len(rest) != 1 or not isinstance(rest[0], Reflections):
        return None
    if not _is_stored(base):
        return None
    unit, core = rest[0].compact()
    return -(base.dense().to(unit.dtype) @ unit) @ core, unit.T


def direction_of(expression: Weight) -> tuple[Weight, Tensor] | None:
    """Return direction and magnitude of a row-normalised sum, or None."""
    if isinstance(expression, Normalized):
        return expression.direction, expression.magnitude.tensor().detach()
    return None


@torch.no_grad()
def dense_change(expression: Weight, base: Tensor) -> Tensor:
    """Return `expression - W0` as a matrix in float32 or better; of a sum the rest, which cancels nothing."""
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    terms = list(expression.parts()) if isinstance(expression, Sum) else []
    if len(terms) > 1 and _is_stored(terms[0]):
        return torch.stack([term.dense().to(dtype) for term in terms[1:]]).sum(0)
    return expression.dense().to(dtype) - base.to(dtype)


def _is_stored(term: Weight) -> bool:
    """Say whether a term is the model's own weight, as it is stored."""
    return isinstance(term, Base) and not isinstance(term, Moved) and term.inner is None


def truncated(pair: Pair, rank: int | None, max_error: float | None) -> tuple[Pair, float]:
    """Return the best pair of smaller rank and its relative Frobenius error; the product is never formed.

    Args:
        pair: up (out, r) and down (r, in).
        rank: of the result; None takes the smallest within `max_error`.
        max_error: largest relative error; 0..1.
    """
    q_up, r_up = torch.linalg.qr(pair[0])
    q_down, r_down = torch.linalg.qr(pair[1].T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return _leading(q_up @ left, values, right @ q_down.T, rank, max_error)


def approximated(matrix: Tensor, rank: int | None, max_error: float | None) -> tuple[Pair, float]:
    """Return the best pair for a dense change, of a rank or within a relative error, and its error.

    Args:
        matrix: (out, in).
        rank: of the pair; None takes the smallest within `max_error`.
        max_error: largest relative Frobenius error; 0..1.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _leading(left, values, right, rank, max_error)


def _leading(
    left: Tensor, values: Tensor, right: Tensor, rank: int | None, max_error: float | None
) -> tuple[Pair, float]:
    """Cut a decomposition left @ diag(values) @ right, split evenly between both factors."""
    chosen = smallest_rank(values, max_error) if rank is None else min(rank, len(values))
    root = values[:chosen].sqrt()
    return (left[:, :chosen] * root, root[:, None] * right[:chosen]), tail_error(values, chosen)


def tail_error(values: Tensor, rank: int) -> float:
    """Return the relative Frobenius error of keeping so many singular values."""
    total = float(torch.linalg.vector_norm(values))
    return float(torch.linalg.vector_norm(values[rank:])) / total if total else 0.0


def smallest_rank(values: Tensor, max_error: float | None) -> int:
    """Return the smallest rank, at least 1, whose relative Frobenius error is within `max_error`."""
    for rank in range(1, len(values) + 1):
        if tail_error(values, rank) <= (max_error or 0.0):
            return rank
    return len(values)
