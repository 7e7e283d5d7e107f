"""CorDA: split the weight by what a context makes of it, and train the part that matters most, or least.

    C = mean over examples of X^T X / max(X)^2,   C' = C + d mean(diag C) I,   W0 C' = U S V^T
    B0 = U_I (S_I / s)^(1/2),   A0 = (S_I / s)^(1/2) V_I^T C'^-1,   W = W0 + s (B A - B0 A0)

Yang et al. 2024. C (in, in) is the Gram matrix of the inputs X (tokens, in), every example divided by its
largest entry. ipm, the instruction-previewed mode (IPA in the paper), trains the first r terms and is
calibrated on the task's own data; kpm, the knowledge-preserved mode (KPA), trains the last r and is
calibrated on data whose answers are to be kept. s B0 A0 of ipm is the Z of rank r with the smallest ||(W0 -
Z) C'||_F; the metric is C' itself and not its root, so this is not the smallest error of the outputs. d =
0.01 is the official code's; it calibrates on 256 examples of 2048 tokens. B0 (out, r), A0 (r, in). As a frame
U_I is orthonormal, the right factor is not. Start: the base up to rounding.

Deviations: W0 is never edited, its residual is a frozen term. No inverse is taken, V^T C'^-1 = S^-1 U^T W0,
in float64 where the device has it; so d is never doubled, which the official code does until its inverse is
accurate. The default is ipm, as the official code leaves the choice open.
"""

from typing import Literal

import torch
from torch import Tensor

from ...linalg import Gram, weighted_low_rank
from ..limits import in_range, one_of
from ..registry import init, near_base
from ..site import Basis, Site

MODES: dict[str, Literal["top", "bottom"]] = {"ipm": "top", "kpm": "bottom"}


@init(
    "corda",
    gives=("residual", "frame"),
    needs=(("input_gram", {"per_sample": "max"}),),
    title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
    year=2024,
    arxiv="2406.05223",
    code="iboing/CorDA",
    formula="W0 C = U S V^T, B0 = U_I (S_I/s)^1/2, A0 = (S_I/s)^1/2 V_I^T C^-1, W = W0 + s (B A - B0 A0)",
    start=near_base(1e-5),
)
def corda(site: Site, rank: int, scaling: float, *, method: str = "ipm", damping: float = 0.01) -> Basis:
    """Return the terms of the weight that a context makes large, or small.

    Args:
        site: the weight.
        rank: number of terms.
        scaling: not used; the split of the terms divides by it.
        method: ipm trains the first terms, kpm the last.
        damping: d, at least 0.
    """
    one_of("corda", MODES, method=method)
    in_range("corda", "[0, inf)", damping=damping)
    gram = Gram(site.statistic("input_gram", per_sample="max").to(site.device))
    terms = weighted_low_rank(site.matrix(), rank, right=gram, select=MODES[method], damping=damping)
    return _triplets(*terms.split())


def _triplets(up: Tensor, down: Tensor) -> Basis:
    """Return U, S and S^-1 U^T W0 from U S^(1/2) and what stands beside it; terms of length zero stay so."""
    root = up.norm(dim=0)
    inverse = torch.where(root > 0, 1 / root, 0)
    return Basis(up * inverse, root.square(), inverse[:, None] * down)
