"""OLoRA: start from the leading columns of a QR factorisation, an orthonormal up factor.

    W0 = Q R,   B0 = Q[:, :r],   A0 = R[:r, :],   W = W0 + s (B A - B0 A0)

Bueyuekakyuez 2024. B0 (out, r) has orthonormal columns, A0 is (r, in). B0 A0 is the projection of W0 on the
span of its first r columns; it is not divided by s.

Deviation: W0 is never edited, its residual is a frozen term.
"""

import torch

from ...linalg.checks import require_finite
from ..registry import init, near_base
from ..site import Factors, Site


@init(
    "olora",
    gives="residual",
    title="OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
    year=2024,
    arxiv="2406.01775",
    formula="W0 = Q R, B0 = Q[:, :r], A0 = R[:r, :], W = W0 + s (B A - B0 A0)",
    start=near_base(1e-5),
)
def olora(site: Site, rank: int, scaling: float) -> Factors:
    """Return the leading columns of Q and rows of R."""
    q, r = torch.linalg.qr(require_finite(site.matrix(), f"the weight of {site.path}"))
    return Factors(q[:, :rank], r[:rank], "residual")
