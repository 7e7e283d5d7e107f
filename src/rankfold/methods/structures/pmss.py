"""PMSS: a small trained matrix between columns and rows of the weight itself.

    W = W0 + s C M R,   C = W0[:, J] (out, r), R = W0[I] (r, in) frozen,   M in R^{r x r},   s = alpha / r

Wang et al. 2024. The rank reaches r with r^2 numbers, whatever the layer's size: r = 256 trains as many
as LoRA with r = 8 on a weight of 4096 x 4096. I and J are pivots of QR decompositions; the options of
init=skeleton choose them otherwise. Start: M = 0, the base, exactly.

The paper's selection is not public; the pivots, M = 0 and alpha = r (so that s = 1) are this package's
reading of it. A step of SGD on M moves W by -lr s^2 C C^T G R^T R, so the learning rate goes with the size of
W0 to the fourth power.

Use it where a high rank is wanted from few numbers, within the span of columns and rows that the weight has.
"""

from ...weights import Weight
from ..framed import framed
from ..registry import structure
from ..site import Site


@structure(
    "pmss",
    title="PMSS: Pretrained Matrices Skeleton Selection for LLM Fine-tuning",
    year=2024,
    arxiv="2409.16722",
    formula="W = W0 + s W0[:, J] M W0[I]",
    init="skeleton",
    starts=("frame",),
    rank=256,
)
def pmss(site: Site, rank: int, *, alpha: float | None = None) -> Weight:
    """Return W0 + s left M right.

    Args:
        site: the weight.
        rank: number of columns and of rows.
        alpha: numerator of the scaling alpha / rank; the rank by default.
    """
    core = site.trained(site.zeros(rank, rank), "core")
    return site.base + site.scaling(alpha, rank) * framed(site, site.basis(rank), core)
