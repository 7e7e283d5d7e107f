"""SingLoRA: one matrix times its own transpose, ramped in over the first steps.

    W = W0 + s u(t) A* A^T   (out <= in)   or   W0 + s u(t) A A*^T   (out > in),   u(t) = min(t / T, 1)

Bensaid et al. 2025. A in R^{n x r}, n = max(out, in), is trained; A* are its first min(out, in) rows; t is
the optimizer's step, s = alpha / r. So a square change is symmetric and positive semi-definite: one layer
cannot lower its weight in a direction, a product of two such as W_q W_k^T can. u is a number of the adapter,
saved and folded as it stands; `rankfold.attach` lets it grow, and without that it stays at its start. r = 8,
alpha = r and T = 1000 are usual, entries normal with variance 1 / n. Start: u(1) = 1 / T, near the base.

Deviations: t is one ahead, because at t = 0 the gradient of A is zero too and the first step would be lost.
Public code draws entries of size 1 / sqrt(r), which is far too large, and advances t in every forward pass,
which gradient accumulation shortens; here t counts steps.
"""

import math

import torch

from ...errors import InvalidOption
from ...weights import Gram, Scaled, Weight
from ..ramp import Ramp
from ..registry import near_base, structure
from ..site import Site


@structure(
    "singlora",
    title="SingLoRA: Low Rank Adaptation Using a Single Matrix",
    year=2025,
    arxiv="2507.05566",
    formula="W = W0 + s u(t) A* A^T",
    start=near_base(0.05, "with the default ramp and alpha"),
    training=Ramp,
)
def singlora(site: Site, rank: int, *, alpha: float | None = None, ramp: int = 1000) -> Weight:
    """Return W0 + s u A* A^T.

    Args:
        site: the weight.
        rank: columns of A.
        alpha: numerator of the scaling; the rank by default.
        ramp: T, steps until the change counts in full, at least 1; 1 is no ramp, and not near the base.
    """
    if ramp < 1:
        raise InvalidOption(f"singlora: ramp must be at least 1 step, not {ramp}")
    size = max(site.shape)
    factor = site.trained(site.normal("factor", size, rank, std=1 / math.sqrt(size)), "factor")
    grown = Scaled(site.frozen(torch.tensor(1 / ramp), "ramp"), Gram(factor, site.shape))
    return site.base + site.scaling(alpha, rank) * grown
