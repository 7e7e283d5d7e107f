"""Whole numbers shared out: by proportion, and by how many of the largest scores each weight holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidOption

Numbers = NDArray[np.float64]
Row = Sequence[float] | Numbers | Tensor
FAINT = 1e-12  # share of the largest weight that the smallest count as: they get what the others cannot hold


def proportional(
    weights: Row,
    total: int,
    *,
    minimum: int | Sequence[int] = 0,
    maximum: int | Sequence[int] | None = None,
    multiple: int = 1,
) -> list[int]:
    """Return whole shares of a total, in proportion to the weights as far as the bounds allow.

        share_i = clip(t w_i, minimum_i, maximum_i), with the t at which the shares sum to the total,

    then rounded by largest remainders, so that the sum is exact. Equal weights get equal shares up to one
    unit (the first ones get it), a scale of all weights changes nothing, and among weights with the same
    bounds a larger one never gets less.

    Args:
        weights: at least 0, one a share; all zero counts as all equal.
        total: what the shares sum to; more than the maxima hold is not shared out, nor is the remainder of a
            total that is not a multiple.
        minimum: for all or for each, rounded up to a multiple.
        maximum: likewise, rounded down; None is no bound.
        multiple: of which every share is one.

    Raises:
        InvalidOption: the minima sum to more than the total, a maximum is below its minimum, a weight is
            negative or not finite, the lengths do not match.

    Example:
        >>> proportional([3, 1, 1], 10)
        [6, 2, 2]
        >>> proportional([3, 1, 1], 12, maximum=5)
        [5, 4, 3]
        >>> proportional([3, 1, 1], 16, minimum=1, multiple=4)
        [8, 4, 4]
    """
    wanted = np.asarray(weights, dtype=np.float64)
    if wanted.ndim != 1 or not np.isfinite(wanted).all() or (wanted < 0).any() or multiple < 1:
        raise InvalidOption(
            "shares need weights that are finite and at least 0, and a multiple of at least 1"
        )
    if not len(wanted):
        return []
    least = -(-_bounds(minimum, len(wanted)) // multiple)
    most = np.maximum(least, total) if maximum is None else _bounds(maximum, len(wanted)) // multiple
    if (most < least).any():
        raise InvalidOption("a maximum is below its minimum (both as multiples)")
    if least.sum() * multiple > total:
        raise InvalidOption(f"the total {total} is below {least.sum() * multiple}, the sum of the minima")
    units = min(total // multiple, int(most.sum()))
    relative = np.maximum(wanted / wanted.max(), FAINT) if wanted.any() else np.ones_like(wanted)
    shares = _clipped(relative, units, least, most)
    return [int(share) * multiple for share in _whole(shares, wanted, units, least, most)]


def top_counts(
    scores: Sequence[Row],
    budget: int,
    *,
    minimum: int | Sequence[int] = 0,
    maximum: int | Sequence[int] | None = None,
) -> list[int]:
    """Return how many of the largest scores of all weights together each weight holds.

    The ranks of EVA: the scores are the explained variance ratios of each weight's components. Equal scores
        go
    to the weight of which fewer are taken, then to the first, so that weights with equal scores get equal
    counts up to one.

    Args:
        scores: of each weight, in any order; rows may differ in length.
        budget: how many are taken in all; all of them where there are fewer.
        minimum: how many of its own a weight keeps at least, for all or for each.
        maximum: at most; None is no bound.

    Returns:
        A count for every weight, summing to the budget where that many may be taken.

    Raises:
        InvalidOption: the minima sum to more than the budget, a weight has fewer scores than its minimum, a
            maximum is below a minimum, or a score is NaN.

    Example:
        >>> top_counts([[0.9, 0.5, 0.1], [0.6, 0.2]], 3)
        [2, 1]
        >>> top_counts([[0.9, 0.8, 0.7], [0.6, 0.2]], 3, minimum=1)
        [2, 1]
    """
    rows = [-np.sort(-np.asarray(row, dtype=np.float64)) for row in scores]
    least = _bounds(minimum, len(rows))
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    most = lengths if maximum is None else np.minimum(lengths, _bounds(maximum, len(rows)))
    if any(np.isnan(row).any() for row in rows):
        raise InvalidOption("a score is NaN")
    if (most < least).any():
        raise InvalidOption("a minimum is above the maximum or above the number of scores of its weight")
    if least.sum() > budget:
        raise InvalidOption(f"the budget {budget} is below {least.sum()}, the sum of the minima")
    free = sorted(
        (-row[place], place, weight)
        for weight, row in enumerate(rows)
        for place in range(int(least[weight]), int(most[weight]))
    )
    counts = least.copy()
    for _, _, weight in free[: budget - int(least.sum())]:
        counts[weight] += 1
    return [int(count) for count in counts]


def _bounds(bound: int | Sequence[int], size: int) -> NDArray[np.int64]:
    bounds = (
        np.broadcast_to(np.asarray(bound, dtype=np.int64), (size,))
        if np.ndim(bound) == 0
        else np.asarray(bound)
    )
    if bounds.shape != (size,) or (bounds < 0).any():
        raise InvalidOption(f"bounds {bound} are not {size} numbers that are at least 0")
    return bounds.astype(np.int64)


def _clipped(weights: Numbers, units: int, least: NDArray[np.int64], most: NDArray[np.int64]) -> Numbers:
    """Return clip(t w, least, most) that sums to the units: piecewise linear and rising in t."""
    knots = np.unique(np.concatenate([least / weights, most / weights]))
    sums = np.clip(knots[:, None] * weights, least, most).sum(1)
    level = np.interp(units, *_rising(sums, knots))
    return np.clip(level * weights, least, most)


def _rising(sums: Numbers, knots: Numbers) -> tuple[Numbers, Numbers]:
    """Return the knots at which the sum has risen, for the inverse to be a function."""
    first = np.concatenate([[True], np.diff(sums) > 0])
    return sums[first], knots[first]


def _whole(
    shares: Numbers, wanted: Numbers, units: int, least: NDArray[np.int64], most: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the shares rounded by largest remainders, within the bounds, summing to the units.

    Among equal remainders the larger weight comes first, then the earlier one.
    """
    whole = np.clip(np.floor(shares).astype(np.int64), least, most)
    remainders = shares - whole
    while (missing := units - int(whole.sum())) != 0:
        step = 1 if missing > 0 else -1
        open_ = whole < most if step > 0 else whole > least
        order = np.lexsort((np.arange(len(whole)), -step * wanted, -step * np.round(remainders, 9)))
        moved = [index for index in order if open_[index]][: abs(missing)]
        whole[moved] += step
        remainders[moved] -= step
    return whole
