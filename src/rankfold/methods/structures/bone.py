"""Bone: one trained block per row of shards, which multiplies the weight's own shards.

    W_ij = W0_ij + (W0_ij + I) B_i,   B in R^{(out / r) x r x r}, W0_ij the r x r shards of W0

Kang and Yin 2024, first version ("weight guide", today's BAT). r divides out and in: where the rank does not,
the largest smaller common divisor is taken, as rank rules need it. It differs from MiSS by the factor W0_ij
beside I: W0_ij = 0 gives shards that repeat along the input. The change has full rank. r = 64 is the paper's,
there is no alpha. Start: B = 0, the base, exactly, and B has a gradient.
"""

import math

from ...errors import InvalidOption
from ...weights import Weight
from ...weights.shards import Sharded
from ..registry import structure
from ..site import Site


def largest_shard(shape: tuple[int, int]) -> int:
    """Return the largest shard; where there is none, the smaller side, so that the refusal names bone."""
    common = math.gcd(*shape)
    return common if common > 1 else min(shape)


@structure(
    "bone",
    stage="modulate",
    title="Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large "
    "Language Models",
    year=2024,
    arxiv="2409.15371",
    code="JL-er/Bone",
    formula="W_ij = W0_ij + (W0_ij + I) B_i",
    rank=64,
    refuses=("odd",),
    limit=largest_shard,
)
def bone(site: Site, rank: int) -> Weight:
    """Return W0 + (W0 + I) B.

    Args:
        site: the weight.
        rank: side of a shard; where it does not divide both sides of the weight, the next smaller that does.
    """
    common = math.gcd(*site.shape)
    size = max(d for d in range(1, rank + 1) if common % d == 0)
    if size == 1 < rank:
        raise InvalidOption(
            f"{site.path}: bone cannot cut {site.shape[0]}x{site.shape[1]} into square shards of 2 to "
            f"{rank}; leave the layer out"
        )
    blocks = site.trained(site.zeros(site.shape[0] // size, size, size), "blocks")
    return site.base + Sharded(site.base, blocks)
