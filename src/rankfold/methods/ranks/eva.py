"""EVA's ranks: every weight gets as many ranks as it has components among those that explain the most.

    xi_ij = S_ij^2 / (M_i sum of the variances of the inputs of weight i),   j = 1..round(rho r)
    r_i = how many of the n r largest of all xi are weight i's

Paischer et al. 2024. r is the rank that was asked for, n the number of weights, so n r ranks are shared out;
S_ij are the singular values of the centred inputs of weight i over M_i tokens. rho = 2 is the paper's and
bounds every r_i; rho = 1 gives all weights the same. Weights whose inputs explain little are left out. alpha
is divided by r whatever a weight gets, which is the paper's adjusted scaling alpha r_i / r over r_i.

Where a structure wants multiples of m, the scores are those of m components together, and none is given
beyond what a weight can hold. Equal scores, as of weights that share an input, go to the weight that has
fewer, then to the one that comes first in the model; so weights that share an input get the same ranks up to
one.

Deviations: scores are normalised by the total variance as in the official code, which the paper writes in
another way; equal scores are not decided by the order of a sort; where the inputs have fewer components than
there are ranks to share out, the rest is not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...linalg import top_counts
from ..limits import in_range
from ..registry import Need, ranks
from ..rules import Unit


def largest_rank(options: Mapping[str, Any], rank: int) -> int:
    """Return the most that one weight may get."""
    return round(float(options["rho"]) * rank)


def components(options: Mapping[str, Any], rank: int) -> list[Need]:
    """Return the statistics that the scores are read from."""
    count = max(rank, largest_rank(options, rank))
    return [("input_pca", {"components": count, "iterations": options["iterations"]})]


@ranks(
    "eva",
    needs=components,
    largest=largest_rank,
    title="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
    year=2024,
    arxiv="2410.07170",
    code="ml-jku/EVA",
    formula="r_i = how many of the n r largest explained variance ratios are weight i's",
)
def eva(units: Sequence[Unit], rank: int, *, rho: float = 2.0, iterations: int | None = 4) -> dict[str, int]:
    """Share ranks out by explained variance.

    Args:
        units: the weights.
        rank: r, the mean of what is shared out.
        rho: the most that a weight gets, as a multiple of r, at least 1.
        iterations: power iterations of a randomised decomposition of every batch; None takes the exact one.
    """
    in_range("eva", "[1, inf)", rho=rho)
    most = largest_rank({"rho": rho}, rank)
    steps = rank // units[0].multiple * len(units)
    counts = top_counts([_scores(unit, most) for unit in units], steps)
    return {unit.path: count * unit.multiple for unit, count in zip(units, counts, strict=True)}


def _scores(unit: Unit, most: int) -> list[float]:
    """Return the explained variance of every step of a weight's rank, up to what it may get."""
    explained = unit.site.statistic("input_pca").explained.double()
    most = min(most, len(explained), len(explained) if unit.limit is None else unit.limit)
    steps = most // unit.multiple
    scores: list[float] = explained[: steps * unit.multiple].view(steps, unit.multiple).sum(1).tolist()
    return scores
