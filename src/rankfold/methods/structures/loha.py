"""LoHa: the entrywise product of two trained low-rank matrices.

    W = W0 + s (B1 A1) . (B2 A2),   B1, B2 in R^{out x r}, A1, A2 in R^{r x in},   s = alpha / r,
    rank <= r^2

Hyeon-Woo et al. 2021 (FedPara), as an adapter in LyCORIS. The same map as ABBA's, from a start that does not
read W0: B1 and A1 are Kaiming uniform with a = sqrt(5), bounds 1 / sqrt(r) and 1 / sqrt(in), and the second
product is zero. Rank 8 and alpha = r are the library defaults. Start: the base, exactly.

Deviations: the zero factor of the second product is the initialiser's, B2, where peft zeroes A2; the smaller
form for convolutions, a Tucker core in either product, is left out.
"""

import math

from ...weights import Weight
from ..registry import structure
from ..site import Site
from .abba import entrywise


@structure(
    "loha",
    title="FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
    year=2021,
    arxiv="2108.06098",
    code="KohakuBlueleaf/LyCORIS",
    formula="W = W0 + s (B1 A1) . (B2 A2)",
    init="kaiming",
    starts=("zero",),
    pairs="parts",
    sides=True,
    entries=True,
)
def loha(site: Site, rank: int, *, alpha: float | None = None) -> Weight:
    """Return W0 + s (B1 A1) . (B2 A2).

    Args:
        site: the weight.
        rank: of either product.
        alpha: numerator of the scaling; the rank by default.
    """
    out, columns = site.shape
    left = site.uniform("up1", out, rank, bound=1 / math.sqrt(rank))
    right = site.uniform("down1", rank, columns, bound=1 / math.sqrt(columns))
    return entrywise(site, rank, left, right, site.scaling(alpha, rank))
