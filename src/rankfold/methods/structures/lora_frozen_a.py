"""Frozen A: LoRA with a random orthonormal down factor that stays, and a trained up factor.

    W = W0 + s B A0,   A0 A0^T = I_r frozen, A0 in R^{r x in}, B in R^{out x r} trained from 0,
    s = alpha / r

Zhu et al. 2024 find that B matters more than A. One SGD step moves W by -lr s^2 G P with the projector P =
A0^T A0: full fine-tuning, projected. Rank 8 and alpha = 2 r are the paper's. A0 is the Q factor of a normal
matrix drawn from the seed. Start: the base, exactly.

Deviation: what the paper compares with, the mirror image (B0 frozen, A trained) and an A0 of singular vectors
or Kaiming's, is left out.
"""

from ...weights import Weight
from ..registry import structure
from ..site import Site


@structure(
    "lora-frozen-a",
    title="Asymmetry in Low-Rank Adapters of Foundation Models",
    year=2024,
    arxiv="2402.16842",
    code="Jiacheng-Zhu-AIML/AsymmetryLoRA",
    formula="W = W0 + s B A0, A0 orthonormal and frozen",
)
def lora_frozen_a(site: Site, rank: int, *, alpha: float | None = None) -> Weight:
    """Return W0 + s B A0.

    Args:
        site: the weight.
        rank: rows of A0.
        alpha: numerator of the scaling; twice the rank by default.
    """
    scaling = site.scaling(2 * (site.reference or rank) if alpha is None else alpha, rank)
    down = site.orthonormal("down", site.shape[1], rank).T
    product = site.trained(site.zeros(site.shape[0], rank), "up") @ site.frozen(down, "down")
    return site.base + scaling * product
