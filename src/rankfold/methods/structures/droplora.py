"""DropLoRA: noise between the two factors while training, so that every step works in another subspace.

    training   y = W0 x + s B (m . A x),   m ~ Bernoulli(1 - p) / (1 - p) in R^r;      W = W0 + s B A

Zhang 2025. s = alpha / r. The official code draws m anew for every token, as here; with together=True one m
serves a call, as in the paper's text. r = 32, alpha = 2 r, p = 0.5 are the paper's. Start: the base, exactly.

Deviations: no dropout of the input by default (the paper's runs: 0.05); the code's learned mask is left out;
a start that is subtracted is not thinned. Embeddings and an attention's own weights are refused.
"""

from ...weights import Dense, Dropped, Weight
from ..limits import in_range
from ..registry import structure
from ..site import Site


@structure(
    "droplora",
    title="DropLoRA: Sparse Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
    year=2025,
    arxiv="2508.17337",
    code="TayeeChang/DropLoRA",
    formula="W = W0 + s B diag(m) A, m random while training",
    init="kaiming",
    starts=("zero", "residual", "displaced"),
    rank=32,
    layers=("linear", "convolution"),
    pairs="terms",
    sides=True,
    entries=True,
    noisy=True,
)
def droplora(
    site: Site,
    rank: int,
    *,
    alpha: float | None = None,
    probability: float = 0.5,
    together: bool = False,
    dropout: float = 0.0,
) -> Weight:
    """Return W0 + s B A with noise between B and A.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        alpha: numerator of the scaling; twice the rank by default.
        probability: of switching one of the r numbers off while training, in [0, 1).
        together: switch the same ones off for all tokens of a call.
        dropout: probability, in [0, 1), of dropping an input entry of the change while training.
    """
    in_range("droplora", "[0, 1)", probability=probability)

    def thinned(up: Dense, down: Dense) -> Weight:
        return (Dropped(up, probability, together=together) if up.trainable and probability else up) @ down

    scaling = site.scaling(2 * (site.reference or rank) if alpha is None else alpha, rank)
    return site.base + site.change(site.factors(rank, scaling), scaling, form=thinned, dropout=dropout)
