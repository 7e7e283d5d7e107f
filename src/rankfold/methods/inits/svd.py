"""The leading singular triplets of the weight as a frozen frame.

    W0 ~ U_r diag(S_r) V_r^T,   U_r (out, r), S_r (r,), V_r^T (r, in)

Eckart and Young 1936: no approximation of rank r is nearer to W0.
"""

from ...linalg import truncated_svd
from ..limits import in_range
from ..registry import init
from ..site import Basis, Site


@init(
    "svd",
    gives="frame",
    title="The approximation of one matrix by another of lower rank",
    year=1936,
    formula="W0 ~ U_r diag(S_r) V_r^T",
)
def svd(site: Site, rank: int, scaling: float, *, iterations: int | None = None) -> Basis:
    """Return the leading singular triplets.

    Args:
        site: the weight.
        rank: number of triplets.
        scaling: not used.
        iterations: power iterations of a randomised decomposition; None takes the exact one.
    """
    in_range("svd", "[0, inf)", iterations=iterations)
    triplets = truncated_svd(site.matrix(), rank, iterations=iterations, generator=site.generator("range"))
    return Basis(*triplets)
