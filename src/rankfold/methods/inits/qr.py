"""The leading terms of the QR decomposition of the weight with column pivoting.

    W0 P = Q R,   R_11 >= R_22 >= ... >= 0,   W0 ~ Q_r diag(R_ii) (D^-1 R_r P^T) = Q_r Q_r^T W0

Businger and Golub 1965. left = Q_r (out, r) has orthonormal columns that span r columns of W0, chosen one by
one as the longest outside the span of those before; values = R_ii (r,); right = D^-1 R_r P^T (r, in) is in
the order of the inputs, its rows not orthogonal, with entries of at most 1 in the columns that were not
chosen earlier. values * right is R_r P^T, the rows of QR-LoRA (2025). The approximation is the projection of
W0 on the chosen columns, which it holds exactly, and W0 itself from the rank of W0 on; beyond that rank
values and rows of right are zero. In practice its error is a small multiple of the singular value
decomposition's, in the worst case 2^r times as large (Kahan's matrix).

As factors the terms are split evenly, B0 = Q_r (R_ii / s)^(1/2), A0 = (R_ii / s)^(1/2) right.
"""

from ...linalg import pivoted_qr
from ..registry import init, near_base
from ..site import Basis, Site


@init(
    "qr",
    gives=("frame", "residual"),
    title="Linear least squares solutions by Householder transformations",
    year=1965,
    formula="W0 ~ Q_r diag(R_ii) (D^-1 R_r P^T), W0 P = Q R",
    start=near_base(1e-5),
)
def qr(site: Site, rank: int, scaling: float) -> Basis:
    """Return the leading terms, by pivots.

    Args:
        site: the weight.
        rank: number of terms.
        scaling: not used; the split of the terms divides by it.
    """
    found = pivoted_qr(site.matrix(), rank)
    return Basis(found.left, found.values, found.right)
