"""HRA: the weight's inputs pass through a product of r trained Householder reflections.

    W = W0 H,   H = (I - 2 v_1 v_1^T) ... (I - 2 v_r v_r^T) = I - V T V^T,   v_i = u_i / ||u_i||

Yuan et al. 2024. u_i in R^in are trained. W W^T and the singular values stay those of W0; rank(W - W0) <= r.
As in the official code r = 8 and the vectors are Kaiming uniform (a = sqrt 5), every one repeated so that the
reflections cancel in pairs. The paper's regulariser is `penalty`. Start: the base up to rounding.

Deviations: the rank is even, an odd one could not start at the base; the strictly orthogonal (Gram-Schmidt)
form is left out, for H = I - 2 Q Q^T is never the identity.

Use it where the singular values of the weight and the angles between its rows have to stay, and the change
has to be of low rank.
"""

import math

import torch
from torch import Tensor, nn

from ...weights import Reflections, Weight
from ..registry import near_base, structure
from ..site import Site


@structure(
    "hra",
    stage="transform",
    title="Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
    year=2024,
    arxiv="2405.17484",
    code="DaShenZi721/HRA",
    formula="W = W0 prod_i (I - 2 v_i v_i^T)",
    start=near_base(1e-5),
    limit=lambda shape: shape[1],
    entries=True,
    multiple=lambda options: 2,
)
def hra(site: Site, rank: int) -> Weight:
    """Return W0 H.

    Args:
        site: the weight.
        rank: how many reflections, an even number.
    """
    half = site.uniform("vectors", site.shape[1], rank // 2, bound=1 / math.sqrt(rank // 2))
    vectors = site.trained(half.repeat_interleave(2, dim=1), "vectors")
    return site.base @ Reflections(vectors)


def penalty(model: nn.Module) -> Tensor:
    """Return the sum over weights of ||I - V^T V||_F, added to the loss times lambda (paper: 1e-4)."""
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, Reflections):
            unit, _ = module.compact()
            rest = torch.eye(unit.shape[1]).to(unit) - unit.T @ unit
            total = total.to(unit) + torch.linalg.matrix_norm(rest)
    return total
