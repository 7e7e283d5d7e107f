"""MiSS: one trained shard, repeated along the input.

    W = W0 + D [I_r I_r ...],   D in R^{out x r}, the last copy cut where r does not divide in

Kang and Yin 2024/2025 (the second form of Bone, DiSHA). Column j of the change equals column j + r; it is
LoRA with A frozen to the tiled identity, applied by adding the input's shards, so nothing is multiplied on
the way in, and that sum, not the input, is kept for backward. Bone's blocks multiply W0's own shards beside
it (`weights.shards` has both). r = 64 is the paper's, there is no alpha. Start: D = 0, the base, exactly, and
D has a gradient.

Deviation: the form "mini", which repeats D along the output too, is left out.
"""

from ...weights import Dropped, Repeated, Weight
from ..limits import in_range
from ..registry import structure
from ..site import Site


@structure(
    "miss",
    title="Balancing LoRA Performance and Efficiency with Simple Shard Sharing",
    year=2025,
    arxiv="2409.15371",
    code="JL-er/MiSS",
    formula="W = W0 + D [I_r I_r ...]",
    rank=64,
)
def miss(site: Site, rank: int, *, dropout: float = 0.0) -> Weight:
    """Return W0 + D [I_r I_r ...].

    Args:
        site: the weight.
        rank: columns of D, after which the change repeats.
        dropout: probability, in [0, 1), of dropping an input entry of the change while training.
    """
    in_range("miss", "[0, 1)", dropout=dropout)
    change = Repeated(site.trained(site.zeros(site.shape[0], rank), "shard"), site.shape[1])
    return site.base + (Dropped(change, dropout) if dropout else change)
