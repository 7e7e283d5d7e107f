"""ABBA: the entrywise product of two trained low-rank matrices, one started at the weight's leading subspace.

    W = W0 + s (B1 A1) . (B2 A2),   B1 = U_r sqrt(S_r), A1 = sqrt(S_r) V_r^T,   B2 = 0, A2 Kaiming with a = 0

Singhal et al. 2025. B1, B2 in R^{out x r}, A1, A2 in R^{r x in} are all trained, nothing is subtracted from
W0. Applied through the Khatri-Rao product of the factors, rank r^2, or through the matrix where that costs
less. As in the official code r = 32 and s = alpha = r (there sqrt(alpha1 alpha2)). Weight decay shrinks B1
and A1, which start large. Start: the base, exactly.

Deviations: both products have one rank, as in all of the paper's runs; the decomposition is exact, not
randomised.
"""

from torch import Tensor

from ...linalg import truncated_svd
from ...weights import Weight
from ..registry import structure
from ..site import Site


def entrywise(site: Site, rank: int, left: Tensor, right: Tensor, scaling: float) -> Weight:
    """Return W0 + scaling (left right) . (B2 A2), the second product started by the initialiser."""
    first = site.trained(left, "up1") @ site.trained(right, "down1")
    return site.base + scaling * (first * site.change(site.factors(rank), 1.0))


@structure(
    "abba",
    title="ABBA: Highly Expressive Hadamard Product Adaptation for Large Language Models",
    year=2025,
    arxiv="2505.14238",
    code="CERT-Lab/abba",
    formula="W = W0 + s (B1 A1) . (B2 A2)",
    init=("kaiming", {"a": 0.0}),
    starts=("zero",),
    pairs="parts",
    sides=True,
    entries=True,
    rank=32,
)
def abba(site: Site, rank: int, *, alpha: float | None = None) -> Weight:
    """Return W0 + s (B1 A1) . (B2 A2).

    Args:
        site: the weight.
        rank: of either product.
        alpha: the scaling s itself; the rank by default.
    """
    left, right = site.zeros(site.shape[0], rank), site.zeros(rank, site.shape[1])
    if not site.blank:
        u, values, vt = truncated_svd(site.matrix(), rank)
        left, right = u * values.sqrt(), values.sqrt()[:, None] * vt
    return entrywise(site, rank, left, right, rank * site.scaling(alpha, rank))
