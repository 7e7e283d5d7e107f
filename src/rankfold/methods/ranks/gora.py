"""GoRA's ranks: every weight gets rank in proportion to how much its gradient would change it.

    I_l = mean |W0_l * G_l|,   a_l = I_l / sum I,   P = sum_l f(out_l + in_l) r
    r_l = clip(round(P a_l) // f(out_l + in_l), r_min, r_max)

He et al. 2025. G_l (out, in) is the mean gradient at W0, r the rank that was asked for. r_min = r / 2, r_max
= 4 r and f = the identity are those of the official runs (r = 8, 4 to 32); `cost` takes the square root or
the logarithm for f, as the code can. alpha is divided by what the weight itself gets, or by its root
(rank_stabilised, as in the paper).

Ranks are rounded to multiples and cut to what a weight can hold where the structure asks for it. The paper
starts the factors from the same gradient (init=gora).

Deviations: none known; the total is not kept, neither here nor in the paper, because of the bounds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import InvalidOption
from ..limits import in_range, one_of
from ..registry import ranks
from ..rules import Unit

COSTS: dict[str, Callable[[float], float]] = {"linear": float, "root": math.sqrt, "log": math.log1p}


def largest_rank(options: Mapping[str, Any], rank: int) -> int:
    """Return r_max."""
    return round(float(options["maximum"]) * rank)


@ranks(
    "gora",
    needs=("gradient",),
    scales="own",
    largest=largest_rank,
    title="GoRA: Gradient-driven Adaptive Low Rank Adaptation",
    year=2025,
    arxiv="2502.12171",
    code="hhnqqq/MyTransformers",
    formula="r_l in proportion to mean |W0_l * G_l|, per f(out + in), within r_min..r_max",
)
def gora(
    units: Sequence[Unit], rank: int, *, minimum: float = 0.5, maximum: float = 4.0, cost: str = "linear"
) -> dict[str, int]:
    """Share ranks out by the importance of the weights.

    Args:
        units: the weights.
        rank: r.
        minimum: r_min as a multiple of r, at least 0; 0 lets a weight go without.
        maximum: r_max as a multiple of r, at least 1 and the minimum.
        cost: f, of what a rank costs: linear, root or log.
    """
    in_range("gora", "[1, inf)", maximum=maximum)
    in_range("gora", f"[0, {maximum}]", minimum=minimum)
    one_of("gora", COSTS, cost=cost)
    importances = [_importance(unit) for unit in units]
    total = sum(importances)
    if not total > 0:
        raise InvalidOption("gora: the gradient of every weight is zero; calibrate on other batches")
    costs = [COSTS[cost](unit.cost) for unit in units]
    budget = sum(costs) * rank
    least, most = round(minimum * rank), round(maximum * rank)
    wanted = [round(budget * i / total) // c for i, c in zip(importances, costs, strict=True)]
    return {
        u.path: _fitted(u, min(max(w, least), most), least, most) for u, w in zip(units, wanted, strict=True)
    }


def _importance(unit: Unit) -> float:
    gradient = unit.site.statistic("gradient").to(unit.site.device)
    return float((unit.site.matrix() * gradient).abs().double().mean())


def _fitted(unit: Unit, rank: float, least: int, most: int) -> int:
    """Return the nearest rank that the weight can hold, no multiple of it above the largest."""
    return unit.fitted(min(rank, most // unit.multiple * unit.multiple), least)
