"""LoRA: a frozen weight plus a trained rank-r product.

    W = W0 + s B A,   B in R^{out x r}, A in R^{r x in},   s = alpha / r

Hu et al. 2021. Rank-stabilised scaling (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732) is s = alpha / sqrt(r).
Dropout acts on the input of the change only. Rank 8, alpha = r and no dropout are the usual library defaults.
On a convolution A is a kernel of r output channels and B mixes channels; on an embedding B is looked up.
Start: the base, exactly.

Use it as the baseline that others are compared with, and where the adapter has to be read elsewhere: plain
LoRA is what servers read alike.
"""

from ...weights import Weight
from ..registry import structure
from ..site import Site


@structure(
    "lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    year=2021,
    arxiv="2106.09685",
    code="microsoft/LoRA",
    formula="W = W0 + s B A",
    init="kaiming",
    starts=("zero", "residual", "displaced"),
    pairs="terms",
    sides=True,
    entries=True,
)
def lora(
    site: Site, rank: int, *, alpha: float | None = None, rank_stabilised: bool = False, dropout: float = 0.0
) -> Weight:
    """Return W0 + s B A.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        alpha: numerator of the scaling; the rank by default.
        rank_stabilised: divide alpha by sqrt(rank) instead of rank.
        dropout: probability, in [0, 1), of dropping an input entry of the change while training.
    """
    return site.base + site.low_rank(rank, site.scaling(alpha, rank, rank_stabilised), dropout)
