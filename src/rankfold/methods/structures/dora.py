"""DoRA: low-rank change of the direction of every row, a trained vector for its length.

    V = W0 + s B A,   W = diag(m / ||V||_row) V,   B in R^{out x r}, A in R^{r x in}, s = alpha / r,
    m in R^out starts at ||W0||_row

Liu et al. 2024. The norm is a constant for the gradient, as the paper's section 4.3 suggests; detach=False
lets it take part, and then no gradient reaches V along its own rows. The bias is not scaled. Dropout acts on
the input of B A only. Rank and alpha are LoRA's; the paper halves LoRA's rank at equal quality. An embedding
is normalised by columns, m in R^dim, because they are its outputs. Start: the base up to rounding.

Use it where the lengths of the weight's rows should move apart from their directions. Training pays for the
norm of every row, the folded weight for nothing.
"""

from ...weights import ColumnNormalized, Normalized, Weight
from ..registry import near_base, structure
from ..site import Site


def normalised(site: Site, direction: Weight, *, detach: bool = True) -> Weight:
    """Return `diag(m / ||V||_row) V`, m trained from the lengths of V; by columns for an embedding.

    Args:
        site: the weight.
        direction: V (out, in).
        detach: leave the norm out of the gradient.
    """
    kind, size = (ColumnNormalized, site.shape[1]) if site.looked_up else (Normalized, site.shape[0])
    weight = kind(direction, site.trained(site.zeros(size), "magnitude"), detach=detach)
    if not site.blank:
        weight.magnitude.tensor().data.copy_(weight.norm().detach())
    return weight


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
    pairs="terms",
    sides=True,
    entries=True,
)
def dora(
    site: Site,
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilised: bool = False,
    dropout: float = 0.0,
    detach: bool = True,
) -> Weight:
    """Return the normalised sum with a trained magnitude.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        alpha: numerator of the scaling; the rank by default.
        rank_stabilised: divide alpha by sqrt(rank) instead of rank.
        dropout: probability, in [0, 1), of dropping an input entry of B A while training.
        detach: leave the norm out of the gradient.
    """
    direction = site.base + site.low_rank(rank, site.scaling(alpha, rank, rank_stabilised), dropout)
    return normalised(site, direction, detach=detach)
