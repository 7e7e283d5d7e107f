"""The Nyström approximation of the weight, by some of its columns and rows.

    W0 ~ C K R,   C = W0[:, J],   K = W0[I, J]^+,   R = W0[I]

Guo et al. 2025. left = C (out, r) and right = R (r, in) are columns and rows of W0, bit for bit; middle = K
(r, r) stands between them, and values are ones. Where W0[I, J] can be inverted, the approximation equals W0
on the rows I and the columns J and errs elsewhere by the Schur complement W22 - W21 W11^-1 W12; it is W0
itself where W0 has the rank of W0[I, J]. The error is bounded only as far as W0[I, J] is well conditioned: of
the first r rows and columns (select="leading", the paper's, which depends on the order of the neurons)
nothing is known; with select="pivoted" they are pivots of QR decompositions, as of `skeleton`.

A structure that takes a frame trains between C and R, as IntTune does. As factors, B0 A0 = C K R / s is split
evenly over its singular values.

Deviations: the official code leaves the pseudo-inverse out, starts from W0[I, J] itself and keeps the base,
so that it does not start at the base; here it does.
"""

from typing import Any

import torch

from ...linalg import nystrom as approximation
from ..registry import init, near_base
from ..site import Basis, Site


@init(
    "nystrom",
    gives=("frame", "residual"),
    title="NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models",
    year=2025,
    arxiv="2502.14482",
    code="TracyGuo2001/NLoRA",
    formula="W0 ~ W0[:, J] W0[I, J]^+ W0[I]",
    start=near_base(1e-3),
)
def nystrom(site: Site, rank: int, scaling: float, *, select: str = "leading") -> Basis:
    """Return columns and rows of the weight, and what belongs between them.

    Args:
        site: the weight.
        rank: number of columns and of rows.
        scaling: not used; the split into factors divides by it.
        select: "leading", the first ones, or "pivoted".
    """
    chosen: Any = select  # refused by name where it is neither
    found = approximation(site.matrix(), rank, select=chosen)
    return Basis(found.left, torch.ones_like(found.core[0]), found.right, middle=found.core)
