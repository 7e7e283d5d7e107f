"""Low-rank training from scratch: a weight is a product of two factors, and nothing else.

    W = B A,   B (out, r),   A (r, in)

The baseline of every paper on low-rank pretraining; Kamalakara et al. 2022 compare its starts. Of the
model's usual start W0 the factors take the best rank-r part, split evenly (their "spectral" start):
W0 = U diag(s) V^T, B = U_r diag(s_r)^(1/2), A = diag(s_r)^(1/2) V_r^T. Start: that approximation.

Deviations: without their weight decay on the product (Frobenius decay); r is a number, not a share.
"""

from dataclasses import replace

from ...linalg import truncated_svd
from ...weights import Weight
from ..registry import not_base, structure
from ..site import Basis, Factors, Site


@structure(
    "low-rank",
    title="Exploring Low Rank Training of Deep Neural Networks",
    year=2022,
    arxiv="2209.13569",
    formula="W = B A, from the best rank-r part of the usual start",
    start=not_base("that of the best rank-r part of every weight"),
    rank=128,
    layers=("linear", "attention", "convolution", "embedding"),
    pairs="terms",
    sides=True,
    entries=True,
    scratch=True,
)
def low_rank(site: Site, rank: int) -> Weight:
    """Return B A.

    Args:
        site: the weight.
        rank: r, of the product that is the weight.
    """
    factors = Factors(site.zeros(site.shape[0], rank), site.zeros(rank, site.shape[1]), "displaced")
    if not site.blank:
        factors = replace(Basis(*truncated_svd(site.matrix(), rank)).split(1.0), start="displaced")
    return site.change(factors, 1.0)
