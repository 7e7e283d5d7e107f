"""The leading terms of the LDU decomposition of the weight with pivots.

    P W0 Q = L D U,   W0 ~ (P^T L_r) diag(D_r) (U_r Q^T)

Gaussian elimination; complete pivoting as in Wilkinson 1961. left = P^T L_r (out, r) and right = U_r Q^T
(r, in) are in the order of the weight; taken in the order of the pivots they are unit lower and unit upper
triangular. values = D_r (r,) are the pivots, of either sign. The approximation holds the pivot rows and
columns of W0 exactly and is W0 itself from the rank of W0 on; a pivot of zero gives the value zero. With
pivoting="complete" the pivot is the largest entry of what remains, no entry of left and right exceeds 1, and
the first terms are the important ones: the error is a small multiple of the singular value decomposition's.
With pivoting="rows" it is the largest of the next column, the columns in their own order, as in LoLDU (2024):
P^T L diag(D) U is then the decomposition that torch has, and its first terms need not be the important ones.

As factors the terms are split evenly, B0 = left sign(D) (|D| / s)^(1/2), A0 = (|D| / s)^(1/2) right.
"""

from typing import Any

from ...linalg import pivoted_lu
from ..registry import init, near_base
from ..site import Basis, Site


@init(
    "lu",
    gives=("frame", "residual"),
    title="Error Analysis of Direct Methods of Matrix Inversion",
    year=1961,
    formula="W0 ~ (P^T L_r) diag(D_r) (U_r Q^T), P W0 Q = L D U",
    start=near_base(1e-4),
)
def lu(site: Site, rank: int, scaling: float, *, pivoting: str = "complete") -> Basis:
    """Return the leading terms, by pivots.

    Args:
        site: the weight.
        rank: number of terms.
        scaling: not used; the split of the terms divides by it.
        pivoting: "complete" or "rows".
    """
    chosen: Any = pivoting  # refused by name where it is neither
    found = pivoted_lu(site.matrix(), rank, pivoting=chosen)
    return Basis(found.left, found.values, found.right)
