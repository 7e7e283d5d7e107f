"""MiLoRA: train the smallest singular triplets of the weight, freeze the rest.

    W0 = U S V^T,   B0 = U_I (S_I / s)^(1/2),   A0 = (S_I / s)^(1/2) V_I^T,   I = the last r of min(out, in)
    W = W0 + s (B A - B0 A0)

Wang et al. 2024. B0 (out, r) and A0 (r, in) start orthogonal to the leading triplets, which hold what the
model knows. Start: the base up to rounding. Triplets of a singular value of zero start from zero on both
sides, so that a weight whose r smallest are zero to the last bit never moves: this is PiSSA's split, without
an exception.

Deviation: W0 is never edited, its residual is a frozen term.

Use it where what the model knows should be disturbed little by what it learns.
"""

from ...linalg import weighted_low_rank
from ..registry import init, near_base
from ..site import Basis, Site


@init(
    "milora",
    gives=("residual", "frame"),
    title="MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
    year=2024,
    arxiv="2406.09044",
    formula="B0 = U_I (S_I/s)^1/2, A0 = (S_I/s)^1/2 V_I^T, I = the r smallest, W = W0 + s (B A - B0 A0)",
    start=near_base(1e-5),
)
def milora(site: Site, rank: int, scaling: float) -> Basis:
    """Return the smallest singular triplets.

    Args:
        site: the weight.
        rank: number of triplets.
        scaling: not used; the split of the triplets divides by it.
    """
    minor = weighted_low_rank(site.matrix(), rank, select="bottom")
    return Basis(minor.left, minor.values, minor.right)
