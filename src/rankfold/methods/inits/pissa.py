"""PiSSA: train the leading singular triplets of the weight, freeze the rest.

    W0 = U S V^T,   B0 = U_r (S_r / s)^(1/2),   A0 = (S_r / s)^(1/2) V_r^T,   W = W0 + s (B A - B0 A0)

Meng et al. 2024. B0 (out, r) and A0 (r, in) hold the leading r triplets, split evenly: s B0 A0 is the best
approximation of W0 of rank r for every scaling s. With `iterations`, the decomposition is randomised.

Deviations: W0 is never edited, its residual is a frozen term; the randomised form is oversampled, which the
paper's fast variant (16 iterations) is not.
"""

from ...linalg import truncated_svd
from ..limits import in_range
from ..registry import init, near_base
from ..site import Basis, Site


@init(
    "pissa",
    gives=("residual", "frame"),
    title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    year=2024,
    arxiv="2404.02948",
    code="GraphPKU/PiSSA",
    formula="B0 = U_r (S_r/s)^1/2, A0 = (S_r/s)^1/2 V_r^T, W = W0 + s (B A - B0 A0)",
    start=near_base(1e-5),
)
def pissa(site: Site, rank: int, scaling: float, *, iterations: int | None = None) -> Basis:
    """Return the leading singular triplets, which are split evenly.

    Args:
        site: the weight.
        rank: number of triplets.
        scaling: the constant before the product, divided out of the split.
        iterations: power iterations of a randomised decomposition; None takes the exact one.
    """
    in_range("pissa", "[0, inf)", iterations=iterations)
    triplets = truncated_svd(site.matrix(), rank, iterations=iterations, generator=site.generator("range"))
    return Basis(*triplets)
