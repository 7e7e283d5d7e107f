"""CP-LoRA, and the normalised forms DoRA-C, convDoRA and CP-DoRA of three changes of a kernel.

    CP-LoRA   dW[o,i,h,w] = s sum_{t=1..r} P[o,t] Q[i,t] S[h,t] T[w,t],   W = W0 + dW,   s = alpha / r
    ...DoRA   V = W0 + dW,   W[o] = m[o] V[o] / ||V[o]||_F,   m in R^Co starts at ||W0[o]||_F

LoRA-based methods on Unet, 2025. P in R^{Co x r}, Q in R^{Ci x r}, S and T in R^{k x r} are trained:
r (Co + Ci + 2 k) numbers. Every unfolding of dW has rank r at most, and a slice dW[o,i] is a sum of r
separable filters. It is applied as a 1x1 mix to r channels, one filter per channel and a 1x1 mix back, so dW
is not formed, save for the norm of a normalised form or where a wide r makes that cheaper.

In the normalised forms dW is lora-c's, convlora's or cp-lora's; they share DoRA's normalisation, whose norm
runs over (Ci, k, k) and is a constant for the gradient (detach=False lets it take part). P = 0, the other
factors are U(-b, b) with b = 1 / sqrt(rows), the default of a convolution. Start: the base exactly, or up to
rounding where it is normalised.

Deviations: s and the start of Q, S and T are reconstructed; with groups Q holds Ci / groups rows, which all
groups share; other windows have one factor per axis, and a linear layer has none: the change is LoRA's.
"""

import math
from typing import Any

from ...weights import Polyadic, Weight
from ..registry import near_base, structure
from ..site import Site
from .convlora import inner_rank
from .dora import normalised
from .lora_c import viewed_change

PAPER: dict[str, Any] = {
    "title": "LoRA-based methods on Unet for transfer learning in Subarachnoid Hematoma Segmentation",
    "year": 2025,
    "arxiv": "2508.01772",
    "limit": None,
    "sides": True,
}


def polyadic_change(site: Site, rank: int, scaling: float) -> Weight:
    """Return `scaling * sum_t P[o,t] Q[i,t] S[h,t] T[w,t]` with P = 0.

    Args:
        site: the weight.
        rank: the number of terms.
        scaling: the constant before the sum.
    """
    sizes = (site.shape[1] // math.prod(site.window), *site.window)
    names = ("in", "window1", "window2", "window3")
    factors = [
        site.trained(site.uniform(name, size, rank, bound=1 / math.sqrt(size)), name)
        for name, size in zip(names, sizes, strict=False)
    ]
    return scaling * Polyadic([site.trained(site.zeros(site.shape[0], rank), "out"), *factors])


@structure("cp-lora", formula="W = W0 + s sum_t P_t o Q_t o S_t o T_t", **PAPER)
def cp_lora(site: Site, rank: int, *, alpha: float | None = None) -> Weight:
    """Return W0 plus a sum of outer products.

    Args:
        site: the weight.
        rank: how many outer products.
        alpha: numerator of the scaling; the rank by default.
    """
    return site.base + polyadic_change(site, rank, site.scaling(alpha, rank))


@structure(
    "dora-c",
    formula="W = m V / ||V||, V = W0 + lora-c",
    pairs="parts",
    start=near_base(1e-5),
    stage="normalise",
    **PAPER,
)
def dora_c(site: Site, rank: int, *, alpha: float | None = None, detach: bool = True) -> Weight:
    """Return W0 plus LoRA-C's change, normalised; see `lora_c`, and `dora` for detach."""
    change = viewed_change(site, rank, site.scaling(alpha, rank))
    return normalised(site, site.base + change, detach=detach)


@structure(
    "convdora",
    formula="W = m V / ||V||, V = W0 + convlora",
    pairs="parts",
    start=near_base(1e-5),
    stage="normalise",
    **PAPER,
)
def convdora(site: Site, rank: int, *, alpha: float | None = None, detach: bool = True) -> Weight:
    """Return W0 plus ConvLoRA's change, normalised; see `convlora`, and `dora` for detach."""
    change = viewed_change(site, inner_rank(site, rank), site.scaling(alpha, rank))
    return normalised(site, site.base + change, detach=detach)


@structure(
    "cp-dora", formula="W = m V / ||V||, V = W0 + cp-lora", start=near_base(1e-5), stage="normalise", **PAPER
)
def cp_dora(site: Site, rank: int, *, alpha: float | None = None, detach: bool = True) -> Weight:
    """Return W0 plus CP-LoRA's change, normalised; see `cp_lora`, and `dora` for detach."""
    change = polyadic_change(site, rank, site.scaling(alpha, rank))
    return normalised(site, site.base + change, detach=detach)
