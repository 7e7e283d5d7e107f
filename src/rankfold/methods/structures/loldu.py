"""LoLDU: train the leading pivots of the weight's LDU decomposition, freeze the triangular factors.

    W0 = P L diag(d) U,   W = W0 + s P L_r diag(z - d_r) U_r,   z in R^r starts at d_r,   s = alpha / r

Shi et al. 2024. P L_r (out, r) and U_r (r, in) are frozen; L is unit lower and U unit upper triangular. The
pivots are those of the official code, the largest of each column in turn, so the first r need not be the
important ones (init=lu takes the largest of what remains). alpha = 1 is the official code's; r = 128 is this
package's choice, where the code also takes the whole side. Start: the base, exactly.

Deviations: the offset z - d_r is what is trained, so weight decay pulls towards the base; s is a constant.
The code's other starts of z are left out: it subtracts d_r there too, and so leaves the base. A pivot of zero
gives a term like any other, where the code divides by it.
"""

from ...weights import Diagonal, Weight
from ..framed import framed
from ..registry import structure
from ..site import Site


@structure(
    "loldu",
    title="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
    year=2024,
    arxiv="2410.13618",
    code="SKDDJ/LoLDU",
    formula="W = W0 + s P L_r diag(z - d_r) U_r, W0 = P L diag(d) U",
    init=("lu", {"pivoting": "rows"}),
    starts=("frame",),
    rank=128,
)
def loldu(site: Site, rank: int, *, alpha: float | None = 1.0) -> Weight:
    """Return W0 + s left diag(offset) right.

    Args:
        site: the weight.
        rank: number of pivots that train.
        alpha: numerator of the scaling alpha / rank; None means the rank.
    """
    offset = Diagonal(site.trained(site.zeros(rank), "offset"))
    return site.base + site.scaling(alpha, rank) * framed(site, site.basis(rank), offset)
