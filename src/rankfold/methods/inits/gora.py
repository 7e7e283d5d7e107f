"""GoRA: a random down factor, and the up factor with which the product is a step along the negative gradient.

    A0 ~ U(-b, b), b = in^(-1/2),   B0 = -xi G A0^T (A0 A0^T)^-1,   xi = gamma (in / r)^(1/2) / s
    W = W0 + s B A,   s B0 A0 = -gamma (in / r)^(1/2) G P_A

He et al. 2025. G (out, in) is the mean gradient at W0, P_A the projector on the rows of A0 (r, in), B0 (out,
r) the least-squares solution of B0 A0 = -xi G. The step has the size of an SGD step of rate gamma, whatever r
and s are: E ||s B0 A0||_F^2 = gamma^2 ||G||_F^2. gamma = 0.05, Kaiming's A0 and 32 batches are those of the
official runs, with alpha = 16, s = alpha / sqrt(r) (rank_stabilised) and a learning rate for B 16 times that
of A; the paper shares out ranks by the same gradient (ranks=gora). Start: the base moved by s B0 A0; a weight
without a gradient starts as LoRA's.

Deviations: the minus sign is the paper's; the official code lost it in August 2025, after which B0 points up
the gradient. The code's optional search for gamma is left out.
"""

import math

import torch

from ..limits import in_range
from ..registry import init, not_base
from ..site import Factors, Site
from .kaiming import kaiming


@init(
    "gora",
    gives="displaced",
    needs=("gradient",),
    title="GoRA: Gradient-driven Adaptive Low Rank Adaptation",
    year=2025,
    arxiv="2502.12171",
    code="hhnqqq/MyTransformers",
    formula="A0 ~ U(-b, b), B0 = -xi G A0^T (A0 A0^T)^-1, W = W0 + s B A",
    start=not_base("the base moved by a projected step of rate gamma along the negative gradient"),
)
def gora(site: Site, rank: int, scaling: float, *, gamma: float = 0.05) -> Factors:
    """Return factors whose product is a projected step along the negative gradient.

    Args:
        site: the weight.
        rank: r.
        scaling: s.
        gamma: learning rate of the SGD step that the start is as large as, positive.
    """
    in_range("gora", "(0, inf)", gamma=gamma)
    down = kaiming(site, rank, scaling).down
    gradient = site.statistic("gradient").to(site.device, site.dtype)
    xi = gamma * math.sqrt(site.shape[1] / rank) / scaling
    # the pseudo-inverse is A^T (A A^T)^-1, without squaring the condition of A
    return Factors(-xi * gradient @ torch.linalg.pinv(down), down, "displaced")
