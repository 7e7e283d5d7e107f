"""LoRA-GA: the first step of B A is the best approximation of the first full step by a matrix of rank 2r.

    G = U S V^T,   A0 = c V[:, :r]^T,   B0 = c U[:, r:2r],   c = out^(1/4) / sqrt(gamma)
    W = W0 + s (B A - B0 A0)

Wang et al. 2024. G (out, in) is the mean gradient over a few batches; A0 (r, in) holds its leading right
singular vectors, B0 (out, r) the next left ones, and no singular value. To first order in the learning rate
lr one SGD step moves the weight by -lr s^2 c^2 [G]_2r. gamma = 16 and s = alpha / sqrt(r) are the official
defaults (use rank_stabilised). `directions` and `scale` are the paper's ablations. Start: the base up to
rounding.

Deviations: the decomposition is exact unless `iterations` are given (official: 4). W0 is never edited, its
residual is a frozen term. The official code's optional clipping of the offset's norm is left out. peft's
lora_ga multiplies B0 by singular values and scales B0 alone, so its first step is no best approximation.
"""

import math

import torch
from torch import Tensor

from ...errors import InvalidOption, InvalidRank
from ...linalg import truncated_svd
from ..limits import in_range, one_of
from ..registry import init, near_base
from ..site import Factors, Site

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weightS")


@init(
    "lora-ga",
    gives="residual",
    needs=("gradient",),
    limit=lambda shape: min(shape) // 2,
    title="LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
    year=2024,
    arxiv="2407.05000",
    code="Outsider565/LoRA-GA",
    formula="A0 = c V_1..r^T, B0 = c U_r+1..2r of the gradient, W = W0 + s (B A - B0 A0)",
    start=near_base(1e-4),
)
def lora_ga(
    site: Site,
    rank: int,
    scaling: float,
    *,
    gamma: float = 16.0,
    directions: str = "ArB2r",
    scale: str = "stable",
    iterations: int | None = None,
) -> Factors:
    """Return disjoint singular directions of the gradient.

    Args:
        site: the weight.
        rank: r; 2r must not exceed the smaller side.
        scaling: s.
        gamma: of the stable scale, positive.
        directions: ArB2r, A2rBr, ArBr (alternating) or random (disjoint).
        scale: stable, unit (c = 1), gd (c = 1 / s) or weightS (mean root of the weight's singular values).
        iterations: power iterations of a randomised decomposition; None takes the exact one.
    """
    in_range("lora-ga", "(0, inf)", gamma=gamma)
    in_range("lora-ga", "[0, inf)", iterations=iterations)
    one_of("lora-ga", DIRECTIONS, directions=directions)
    one_of("lora-ga", SCALES, scale=scale)
    if 2 * rank > min(site.shape):
        raise InvalidRank(
            f"{site.path}: lora-ga needs 2 rank = {2 * rank} <= min(out, in) = {min(site.shape)}"
        )
    gradient = gradient_of(site, "lora-ga")
    count = min(site.shape) if directions == "random" else 2 * rank
    left, _, right = truncated_svd(gradient, count, iterations=iterations, generator=site.generator("range"))
    ups, downs = _indices(site, directions, rank, count)
    constant = _constant(site, scale, rank, scaling, gamma)
    return Factors(constant * left[:, ups], constant * right[downs], "residual")


def gradient_of(site: Site, reader: str) -> Tensor:
    """Return the mean gradient (out, in).

    Raises:
        InvalidOption: it is zero, so it has no direction.
    """
    gradient: Tensor = site.statistic("gradient").to(site.device, site.dtype)
    if not gradient.any():
        raise InvalidOption(
            f"{site.path}{site.block_name}: its gradient is zero, and {reader} starts from directions of the "
            "gradient; calibrate on other batches or leave the weight out"
        )
    return gradient


def _indices(site: Site, directions: str, rank: int, count: int) -> tuple[Tensor, Tensor]:
    order = torch.arange(count)
    if directions == "random":
        order = torch.randperm(count, generator=site.generator("directions"))
    if directions == "ArBr":
        return order[1 : 2 * rank : 2], order[0 : 2 * rank : 2]
    first, second = order[:rank], order[rank : 2 * rank]
    return (first, second) if directions == "A2rBr" else (second, first)


def _constant(site: Site, scale: str, rank: int, scaling: float, gamma: float) -> float:
    if scale == "weightS":
        values = truncated_svd(site.matrix(), rank)[1]
        return float((values / scaling).sqrt().mean())
    return {"stable": math.pow(site.shape[0], 0.25) / math.sqrt(gamma), "unit": 1.0, "gd": 1 / scaling}[scale]
