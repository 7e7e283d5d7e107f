"""QR-LoRA: a combination of fixed terms of the weight's pivoted QR decomposition, one trained number each.

    W0 P = Q R,   W = W0 + sum_i lam_i q_i (R P^T)_i = W0 + Q_r diag(lam) (R P^T)_r,   lam in R^r

Liang et al. 2025. Q_r (out, r) is orthonormal, (R P^T)_r (r, in) in the order of the inputs; both are frozen.
With lam = 1 the change is Q_r Q_r^T W0, the part of W0 in the span of the r leading columns. The terms are as
long as the rows of R, so a step of SGD moves the leading ones most. Start: lam = 0, the base, exactly.

Deviation: r is given, the same for every weight unless a rank rule says otherwise (64 is this package's
choice); in the paper it is the fewest terms whose R_ii^2 are a share tau of their sum.
"""

from ...weights import Diagonal, Weight
from ..framed import framed
from ..registry import structure
from ..site import Site


@structure(
    "qr-lora",
    title="QR-LoRA: QR-Based Low-Rank Adaptation for Efficient Fine-Tuning of Large Language Models",
    year=2025,
    arxiv="2508.21810",
    formula="W = W0 + Q_r diag(lam) (R P^T)_r, W0 P = Q R",
    init="qr",
    starts=("frame",),
    rank=64,
)
def qr_lora(site: Site, rank: int) -> Weight:
    """Return W0 + Q_r diag(lam) (R P^T)_r.

    Args:
        site: the weight.
        rank: entries of lam; columns of Q and rows of R that are kept.
    """
    coefficients = Diagonal(site.trained(site.zeros(rank), "coefficients"))
    return site.base + framed(site, site.basis(rank), coefficients, values="right")
