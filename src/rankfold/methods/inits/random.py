"""Both factors random, behind a gate that is zero: the start of adapters whose terms are gated.

    W = W0 + s B diag(g) A,   g = 0;   B, A ~ N(0, std^2), or both Kaiming uniform with a = sqrt(5)

Zhang et al. 2023 (AdaLoRA) draw both from N(0, 0.02^2), the default; Mao et al. 2024 take Kaiming's bounds,
1 / sqrt(r) for B (out, r) and 1 / sqrt(in) for A (r, in). Start: the base, exactly; at the first step only
the gate has a gradient.
"""

import math

from ..limits import in_range
from ..registry import init
from ..site import Factors, Site


@init(
    "random",
    gives="gated",
    title="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    year=2023,
    arxiv="2303.10512",
    formula="g = 0, B, A ~ N(0, std^2)",
)
def random(site: Site, rank: int, scaling: float, *, std: float = 0.02, kaiming: bool = False) -> Factors:
    """Return two random factors.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        scaling: not used.
        std: standard deviation of both factors, positive.
        kaiming: draw both uniformly within Kaiming's bounds instead.
    """
    in_range("random", "(0, inf)", std=std)
    out, columns = site.shape
    if kaiming:
        up = site.uniform("up", out, rank, bound=1 / math.sqrt(rank))
        return Factors(up, site.uniform("down", rank, columns, bound=1 / math.sqrt(columns)))
    return Factors(site.normal("up", out, rank, std=std), site.normal("down", rank, columns, std=std))
