"""The solvers behind a budget: greedy steps, one threshold, dynamic and integer programming."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidOption, MissingDependency

Numbers = NDArray[np.float64]
TABLE_CELLS = 20_000_000  # units * budget that dynamic programming fills within about a second
DIGITS = 12  # of a slope; what differs beyond them is rounding, and counts as equal


@dataclass(frozen=True, eq=False)
class Unit:
    """The choices of a unit from its minimum on, by what they add to it.

    Attributes:
        cost: added cost (c,), not falling, 0 first.
        gain: added gain (c,), 0 first.
        start: the choice that is the minimum.
        floor: the cost of the minimum.
    """

    cost: Numbers
    gain: Numbers
    start: int
    floor: float

    def axis(self, per: str) -> Numbers:
        """Return what gains are divided by: the costs, or the number of the choice."""
        return self.cost if per == "cost" else np.arange(len(self.cost), dtype=np.float64)

    def step(self, at: int, spare: float, per: str) -> tuple[float, int] | None:
        """Return the slope and end of the steepest affordable step with gain, the shortest among equals."""
        gained = self.gain[at + 1 :] - self.gain[at]
        fits = (self.cost[at + 1 :] - self.cost[at] <= spare) & (gained > 0)
        if not fits.any():
            return None
        axis = self.axis(per)
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = np.where(fits, gained / (axis[at + 1 :] - axis[at]), -np.inf)
        rounded = _rounded(slopes)
        best = int(rounded.argmax())
        return float(rounded[best]), at + 1 + best


def by_steps(units: list[Unit], spare: float, per: str) -> list[int]:
    """Take the steepest step that fits, until none does."""
    chosen, heap = [0] * len(units), list[tuple[float, float, int, int]]()

    def offer(index: int) -> None:
        step = units[index].step(chosen[index], spare, per)
        if step is not None:
            # Equal slopes: the unit that has come the shortest way, then the first.
            heapq.heappush(heap, (-step[0], float(units[index].axis(per)[chosen[index]]), index, step[1]))

    for index in range(len(units)):
        offer(index)
    while heap:
        _, _, index, end = heapq.heappop(heap)
        price = float(units[index].cost[end] - units[index].cost[chosen[index]])
        # What is left only shrinks, so a step that fitted when it was offered may not fit now.
        if price <= spare:
            spare -= price
            chosen[index] = end
        offer(index)
    return chosen


def by_threshold(units: list[Unit], spare: float, per: str) -> list[int]:
    """Take the steps of every unit whose slope is at least the smallest threshold that the budget allows."""
    steps = sorted(
        (-slope, index, end) for index, unit in enumerate(units) for slope, end in _hull(unit, per)
    )
    chosen, trial = [0] * len(units), [0] * len(units)
    for place, (slope, index, end) in enumerate(steps):
        trial[index] = max(trial[index], end)
        if place + 1 == len(steps) or steps[place + 1][0] != slope:
            if math.fsum(unit.cost[end] for unit, end in zip(units, trial, strict=True)) > spare:
                break
            chosen = list(trial)
    return chosen


STEPWISE: dict[str, Callable[[list[Unit], float, str], list[int]]] = {
    "greedy": by_steps,
    "threshold": by_threshold,
}


def best_total(units: list[Unit], spare: float) -> list[int]:
    """Return the choices of the largest total gain, and of the least cost among the equal ones of a unit."""
    whole = all(bool((unit.cost == unit.cost.round()).all()) for unit in units)
    if not whole:
        return by_integer_programming(units, spare)
    costs = [unit.cost.astype(np.int64) for unit in units]
    shared = reduce(math.gcd, (int(price) for row in costs for price in row), 0) or 1
    room = int(min(spare, sum(int(row[-1]) for row in costs))) // shared
    if (room + 1) * len(units) > TABLE_CELLS:
        return by_integer_programming(units, spare)
    return by_dynamic_programming([row // shared for row in costs], [unit.gain for unit in units], room)


def by_dynamic_programming(costs: list[NDArray[np.int64]], gains: list[Numbers], room: int) -> list[int]:
    """Fill best[unit][spent] = max over choices of gain + best[unit - 1][spent - cost], and walk back."""
    best, taken = np.zeros(room + 1), list[NDArray[np.int32]]()
    for cost, gain in zip(costs, gains, strict=True):
        following, choice = np.full(room + 1, -np.inf), np.zeros(room + 1, dtype=np.int32)
        for index, (price, worth) in enumerate(zip(cost.tolist(), gain.tolist(), strict=True)):
            if price > room:
                break
            value = best[: room + 1 - price] + worth
            better = value > following[price:]
            following[price:][better], choice[price:][better] = value[better], index
        best = following
        taken.append(choice)
    return list(_walked_back(costs, taken, room))[::-1]


def _walked_back(costs: list[NDArray[np.int64]], taken: list[NDArray[np.int32]], room: int) -> Iterator[int]:
    for cost, choice in zip(reversed(costs), reversed(taken), strict=True):
        picked = int(choice[room])
        room -= int(cost[picked])
        yield picked


def by_integer_programming(units: list[Unit], spare: float) -> list[int]:
    """Solve with one binary unknown for every choice of every unit, one of them 1 in each (HiGHS, in scipy).

    Raises:
        MissingDependency: scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise MissingDependency(
            "an exact budget over costs that are not integers, or are many, needs the library scipy: "
            "pip install 'rankfold[solvers]'"
        ) from None
    from scipy.sparse import block_diag

    price, worth = (np.concatenate([getattr(unit, name) for unit in units]) for name in ("cost", "gain"))
    scale = max(spare, float(price.max())) or 1.0
    ends = np.cumsum([len(unit.cost) for unit in units])[:-1]
    rules = [
        LinearConstraint(block_diag([np.ones((1, len(unit.cost))) for unit in units], format="csr"), 1, 1),
        LinearConstraint(price[None] / scale, ub=spare / scale),
    ]
    while True:
        solved = milp(
            -worth / (np.abs(worth).max() or 1),
            constraints=rules,
            integrality=np.ones(len(price)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        if solved.x is None:
            raise InvalidOption(f"the integer program of the budget was not solved: {solved.message}")
        chosen = [int(part.argmax()) for part in np.split(solved.x, ends)]
        if math.fsum(unit.cost[pick] for unit, pick in zip(units, chosen, strict=True)) <= spare:
            return chosen
        # The solver keeps the budget to 1e-6 of its scale only. A point above it is cut off, and with it
        # those that cost no less because no unit takes a lower choice.
        above = [np.arange(len(unit.cost)) >= pick for unit, pick in zip(units, chosen, strict=True)]
        rules.append(LinearConstraint(np.concatenate(above)[None].astype(float), ub=len(units) - 1))


def _hull(unit: Unit, per: str) -> Iterator[tuple[float, int]]:
    """Yield slope and end of every step of the upper concave hull of the gains that gains."""
    at = 0
    while (step := unit.step(at, math.inf, per)) is not None:
        yield step
        at = step[1]


def _rounded(slopes: Numbers) -> Numbers:
    """Return the slopes rounded so that equal ones of different weights are equal numbers."""
    finite = np.where(np.isfinite(slopes) & (slopes != 0), slopes, 1.0)
    unit = 10.0 ** (np.floor(np.log10(np.abs(finite))) + 1 - DIGITS)
    return np.where(np.isfinite(slopes) & (slopes != 0), np.round(finite / unit) * unit, slopes)
