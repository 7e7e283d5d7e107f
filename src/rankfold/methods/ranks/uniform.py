"""Every weight gets the rank that was asked for.

    r_l = r

Hu et al. 2021. What a point without a rank rule does too; as a rule it can be named in a comparison. A weight
that is too small for the rank gets all that it can hold, also where it was named.
"""

from collections.abc import Sequence

from ..registry import ranks
from ..rules import Unit


@ranks(
    "uniform",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    year=2021,
    arxiv="2106.09685",
    code="microsoft/LoRA",
    formula="r_l = r",
)
def uniform(units: Sequence[Unit], rank: int) -> dict[str, int]:
    """Give every weight the same rank.

    Args:
        units: the weights.
        rank: r.
    """
    return {unit.path: unit.fitted(rank) for unit in units}
