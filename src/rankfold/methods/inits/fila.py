"""FILA: start from the part of the weight that matters for data to be forgotten and not for data to be kept.

    F = F^f / (F^r + eps),   d_o = (sum_i F_oi)^(1/2),   diag(d) W0 = U S V^T
    B0 = diag(1/d) U_r (S_r / s)^(1/2),   A0 = (S_r / s)^(1/2) V_r^T,   W = W0 + s (B A - B0 A0)

Cha et al. 2024, the initialiser of LoKU. F^f and F^r (out, in) are the mean squared gradients, weighted by
label tokens, of the data sets "forget" and "retain"; s B0 A0 is the Z of rank r with the smallest sum_o d_o^2
||W0_o - Z_o||^2. B0 (out, r), A0 (r, in). A constant ratio gives PiSSA. Squares are those of whole batches,
so the size of the batches matters; the official runs have 2 examples in each and one epoch of both sets. As a
frame the right factor is orthonormal, the left one is not. Start: the base up to rounding.

Deviations: eps is a share of the mean of F^r, 1e-5 by default, and not the number 1e-5, against which squared
gradients of a mean loss vanish, so that the ratio would be that of F^f alone. d is scaled to a mean square of
1, which moves weight between B0 and A0 and not their product. No inverse of d is taken: diag(1/d) U S = W0 V,
so a row that does not matter at all keeps its projection; and the decomposition is exact. W0 is never edited,
its residual is a frozen term. A retained set without gradients leaves F^f alone, a forgotten one PiSSA.

Use it to let a model forget one set of data and keep another.
"""

import torch
from torch import Tensor

from ...linalg import Diagonal, weighted_low_rank
from ..limits import in_range
from ..registry import init, near_base
from ..site import Basis, Site


@init(
    "fila",
    gives=("residual", "frame"),
    needs=("squared_gradient@forget", "squared_gradient@retain"),
    title="Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs",
    year=2024,
    arxiv="2408.06621",
    code="csm9493/efficient-llm-unlearning",
    formula="diag(d) W0 = U S V^T, B0 = diag(1/d) U_r (S_r/s)^1/2, A0 = (S_r/s)^1/2 V_r^T, d^2 from F^f/F^r",
    start=near_base(1e-5),
)
def fila(site: Site, rank: int, scaling: float, *, epsilon: float = 1e-5) -> Basis:
    """Return the leading terms of the weight whose rows weigh what forgetting needs.

    Args:
        site: the weight.
        rank: number of terms.
        scaling: not used; the split of the terms divides by it.
        epsilon: share of the mean of F^r that is added to it, positive.
    """
    in_range("fila", "(0, inf)", epsilon=epsilon)
    forget, retain = (site.statistic("squared_gradient", data=name) for name in ("forget", "retain"))
    weights = row_weights(forget.to(site.device), retain.to(site.device), epsilon)
    up, down = weighted_low_rank(site.matrix(), rank, left=Diagonal(weights)).split()
    root = down.norm(dim=1)
    inverse = torch.where(root > 0, 1 / root, 0)
    return Basis(up * inverse, root.square(), inverse[:, None] * down)


def row_weights(forget: Tensor, retain: Tensor, epsilon: float) -> Tensor:
    """Return d (out,) with a mean square of 1 from the squared gradients F^f and F^r (out, in)."""
    kept = retain + epsilon * retain.mean()
    squares = (forget / torch.where(kept > 0, kept, 1)).sum(1)
    mean = squares.mean()
    return (squares / mean).sqrt() if mean > 0 else torch.ones_like(squares)
