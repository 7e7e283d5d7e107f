"""HiRA: every entry of the weight is scaled by one plus a low-rank change.

    W = W0 . (1 + B A),   B in R^{out x r}, A in R^{r x in},   rank(W - W0) <= r rank(W0)

Huang et al. 2025 (ICLR). No alpha; r = 32 is the paper's. Entries of W0 that are zero never change. Start:
the base up to rounding, B = 0.
"""

from ...weights import Modulated, Weight
from ..registry import near_base, structure
from ..site import Site


def modulated(site: Site, rank: int) -> Weight:
    """Return W0 . (1 + change), from any start of the change."""
    return Modulated(site.base, site.change(site.factors(rank), 1.0))


@structure(
    "hira",
    stage="modulate",
    title="HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
    year=2025,
    code="hqsiswiliam/hira",
    formula="W = W0 . (1 + B A)",
    start=near_base(1e-6),
    init="kaiming",
    starts=("zero",),
    pairs="parts",
    sides=True,
    entries=True,
    rank=32,
)
def hira(site: Site, rank: int) -> Weight:
    """Return W0 . (1 + B A).

    Args:
        site: the weight.
        rank: inner dimension of B A.
    """
    return modulated(site, rank)
