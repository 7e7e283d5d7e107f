"""One budget for many weights: which of its choices every weight takes.

    maximise   sum over weights of gain[weight][choice]
    such that  sum over weights of cost[weight][choice] <= budget

Ranks, bit widths, sparsities and keep-or-drop decisions are such tables.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidOption
from .allocators import STEPWISE, Unit, best_total

Row = Sequence[float] | NDArray[np.float64] | Tensor
ROUNDING = 1e-12  # share of the budget by which a sum of costs that are not integers may round above it


def allocate(
    cost: Sequence[Row],
    gain: Sequence[Row],
    budget: float,
    *,
    method: Literal["greedy", "exact", "threshold"] = "greedy",
    minimum: int | Sequence[int] = 0,
    per: Literal["cost", "choice"] = "cost",
    tied: Sequence[Hashable] | None = None,
) -> list[int]:
    """Return the choice of every weight.

        greedy:     from the minimum, again and again the step with the most gain per cost that still fits
        exact:      the largest total gain; dynamic programming where costs are integers and the table is
                    modest, else integer programming (scipy)
        threshold:  every weight takes the steps whose gain per cost is at least t, one t for all, the
                    smallest at which the budget holds

    A step leads to any higher choice, so that a gain that comes late is seen; its slope is gain per cost.
    Greedy and exact are one for concave gains, up to what remains of the budget. No method takes a step
    without gain. Equal steps are taken for the weight that has spent least, and with `threshold` for all
    weights or none.

    Args:
        cost: of each choice of each weight, not falling along the choices; rows may differ in length.
        gain: likewise; any finite numbers.
        budget: what the costs may add up to.
        method: how.
        minimum: choice below which a weight may not fall, for all or for each.
        per: whether the steps of greedy and threshold are compared by gain per cost, or by gain per choice,
            as rules do that count ranks whatever the width of the weight.
        tied: a label for each weight; weights of one label are one unit, with one choice, that costs and
            gains what they do together.

    Returns:
        An index into each row.

    Raises:
        InvalidOption: the minimum alone is above the budget, the tables do not match or are not finite, costs
            fall, tied rows differ in length, an option is unknown.
        MissingDependency: integer programming is needed and scipy is not installed.

    Example:
        Ranks 0 to 3 of two weights, each rank costing 10 and 20:

        >>> cost = [[0, 10, 20, 30], [0, 20, 40, 60]]
        >>> gain = [[0, 5, 8, 9], [0, 12, 13, 13]]
        >>> allocate(cost, gain, 50)
        [3, 1]
        >>> allocate(cost, gain, 25, method="exact")
        [0, 1]
        >>> allocate(cost, gain, 45, method="threshold")
        [2, 1]
    """
    if method not in ("exact", *STEPWISE) or per not in ("cost", "choice"):
        raise InvalidOption(
            f"method is greedy, exact or threshold and per is cost or choice, not {method!r} and {per!r}"
        )
    if method == "exact" and per != "cost":
        raise InvalidOption("per='choice' orders steps; the exact method orders none")
    rows = _rows(cost, gain, minimum)
    units, members = _united(rows, tied)
    spare = _spare(units, budget)
    steps = best_total(units, spare) if method == "exact" else STEPWISE[method](units, spare, per)
    return [units[unit].start + steps[unit] for unit in members]


def _rows(cost: Sequence[Row], gain: Sequence[Row], minimum: int | Sequence[int]) -> list[Unit]:
    """Return the checked tables, one unit a weight."""
    least = [minimum] * len(cost) if isinstance(minimum, int) else list(minimum)
    if not len(cost) == len(gain) == len(least):
        raise InvalidOption(
            f"{len(cost)} rows of costs, {len(gain)} of gains and {len(least)} minima do not match"
        )
    return [_row(i, *row) for i, row in enumerate(zip(cost, gain, least, strict=True))]


def _row(index: int, cost: Row, gain: Row, least: int) -> Unit:
    costs, gains = (np.asarray(row, dtype=np.float64) for row in (cost, gain))
    if costs.shape != gains.shape or costs.ndim != 1 or not 0 <= least < len(costs):
        raise InvalidOption(
            f"weight {index}: costs of shape {costs.shape}, gains of shape {gains.shape} "
            f"and minimum {least} do not match"
        )
    if not (np.isfinite(costs).all() and np.isfinite(gains).all()):
        raise InvalidOption(f"weight {index}: costs and gains must be finite")
    if (np.diff(costs) < 0).any():
        raise InvalidOption(f"weight {index}: its costs fall along its choices; order the choices by cost")
    return Unit(costs[least:] - costs[least], gains[least:] - gains[least], least, float(costs[least]))


def _united(rows: list[Unit], tied: Sequence[Hashable] | None) -> tuple[list[Unit], list[int]]:
    """Return the units, and for every weight the index of its unit."""
    labels = list(range(len(rows))) if tied is None else list(tied)
    if len(labels) != len(rows):
        raise InvalidOption(f"{len(labels)} labels do not name the ties of {len(rows)} weights")
    groups: dict[Hashable, list[Unit]] = {}
    for label, row in zip(labels, rows, strict=True):
        groups.setdefault(label, []).append(row)
    places = {label: place for place, label in enumerate(groups)}
    return [_sum(label, group) for label, group in groups.items()], [places[label] for label in labels]


def _sum(label: Hashable, group: list[Unit]) -> Unit:
    if len({(len(unit.cost), unit.start) for unit in group}) > 1:
        raise InvalidOption(f"the weights tied as {label!r} have different numbers of choices or minima")
    cost, gain = (np.sum([getattr(unit, name) for unit in group], 0) for name in ("cost", "gain"))
    return Unit(cost, gain, group[0].start, math.fsum(unit.floor for unit in group))


def _spare(units: list[Unit], budget: float) -> float:
    """Return what the minima leave of the budget, with room for the rounding of their sum."""
    least = math.fsum(unit.floor for unit in units)
    exact = all(float(n).is_integer() for u in units for n in (budget, u.floor, *u.cost))
    spare = budget - least + (0 if exact else ROUNDING * abs(budget))
    if not spare >= 0:
        raise InvalidOption(
            f"the budget {budget:g} is below {least:g}, the cost of the minimum of every weight"
        )
    return spare
