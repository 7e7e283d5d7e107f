"""DoRA: low-rank change of the direction of every row, a trained vector for its length.

    V = W0 + s B A,   W = diag(m / ||V||_row) V,   m in R^out starts at ||W0||_row

Liu et al. 2024. The norm is left out of the gradient, as in the paper's section 4.3, and is expanded over the
factors, so that B A is never formed. The bias is not scaled.
"""

from ...weights import Normalized, Weight
from ..registry import near_base, structure
from ..site import Site, scaling_of


@structure(
    "dora",
    stage="normalise",
    title="DoRA: Weight-Decomposed Low-Rank Adaptation",
    year=2024,
    arxiv="2402.09353",
    code="NVlabs/DoRA",
    formula="W = m (W0 + s B A) / ||W0 + s B A||_row",
    start=near_base(1e-5),
    init="kaiming",
    starts=("zero", "residual", "displaced"),
)
def dora(
    site: Site, rank: int, *, alpha: float | None = None, rank_stabilised: bool = False, dropout: float = 0.0
) -> Weight:
    """Return the row-normalised sum with a trained magnitude; arguments as for lora."""
    direction = site.base + site.low_rank(rank, scaling_of(alpha, rank, rank_stabilised), dropout)
    weight = Normalized(direction, site.trained(site.zeros(site.shape[0]), "magnitude"))
    if not site.blank:
        weight.magnitude.tensor().data.copy_(weight.norm().detach())
    return weight
