"""NoRA: a LoRA between the frozen outer factors of another one, which hold the weight's singular triplets.

    W = W0 + s B1 B2 A2 A1,   B1 = U_R S_R^(1/2), A1 = S_R^(1/2) V_R^T,   s = alpha / r

Lin et al. 2024. B1 (out, R) and A1 (R, in) are frozen, B2 in R^{R x r} and A2 in R^{r x R} trained: 2 R r
numbers, whatever the layer's size. The change stays between the R leading singular subspaces and has rank r
at most. lora-xs trains all of the core, on a frame whose values stand on the right. Start: B2 = 0 and A2
Kaiming uniform (a = sqrt 5), the base, exactly.

The paper's split and start are not public; the even split, the start, R = 64 and r = 8 are this package's.
"""

import math

from ...errors import InvalidOption
from ...weights import Weight
from ..framed import framed
from ..registry import structure
from ..site import Site


@structure(
    "nora",
    title="NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models",
    year=2024,
    arxiv="2408.10280",
    formula="W = W0 + s U_R S_R^1/2 (B2 A2) S_R^1/2 V_R^T",
    init="svd",
    starts=("frame",),
    sides=True,
)
def nora(
    site: Site, rank: int, *, outer_rank: int = 64, alpha: float | None = None, split: str = "sqrt"
) -> Weight:
    """Return W0 + s B1 B2 A2 A1.

    Args:
        site: the weight.
        rank: of the trained product, at most the outer one.
        outer_rank: of the frozen factors, cut to the smaller side of the weight.
        alpha: numerator of the scaling alpha / rank; the rank by default.
        split: where the singular values go: "sqrt" (evenly), "left", "right" or "none".
    """
    outer = min(outer_rank, *site.shape)
    if rank > outer:
        raise InvalidOption(
            f"{site.path}: nora needs a rank of at most the outer one, and {rank} is above {outer}; raise "
            "outer_rank or lower rank"
        )
    up = site.trained(site.zeros(outer, rank), "up")
    down = site.trained(site.uniform("down", rank, outer, bound=1 / math.sqrt(outer)), "down")
    change = framed(site, site.basis(outer), up @ down, values=split)
    return site.base + site.scaling(alpha, rank) * change
