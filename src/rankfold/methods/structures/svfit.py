"""SVFit: train the leading singular values, freeze both singular bases and the rest of the spectrum.

    W = U_r diag(z) V_r^T + W_rest = W0 + U_r diag(z - S_r) V_r^T,   z in R^r starts at S_r

Sun et al. 2024. U_r (out, r) and V_r (in, r) are frozen. Start: the base, exactly.

Deviations: the offset z - S_r is what is trained, so weight decay pulls towards the base; r = 128 is this
package's choice, the paper takes the r that holds 99 % of the spectrum.

Use it where r numbers a weight are enough: it can make the leading directions of the weight stronger and
weaker, and not turn them.
"""

from ...weights import Diagonal, Weight
from ..framed import framed
from ..registry import structure
from ..site import Site


@structure(
    "svfit",
    title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
    year=2024,
    arxiv="2409.05926",
    formula="W = W0 + U_r diag(z - S_r) V_r^T",
    init="svd",
    starts=("frame",),
    rank=128,
)
def svfit(site: Site, rank: int) -> Weight:
    """Return W0 + U_r diag(offset) V_r^T.

    Args:
        site: the weight.
        rank: how many leading singular values are trained.
    """
    offset = Diagonal(site.trained(site.zeros(rank), "offset"))
    return site.base + framed(site, site.basis(rank), offset)
