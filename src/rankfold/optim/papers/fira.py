"""Fira: GaLore plus the part of the gradient that it drops, scaled as Adam scaled the part that it keeps.

    D = scale P N + S,   N = adam(R),   S = E phi,   E = G - P R,   phi_j = |N_j| / |R_j|
    |S_t| <= 1.01 |S_{t-1}|

Chen et al. 2024. Columns j run along the side that is not projected. The limit of growth keeps a single
large gradient from leaving a spike. lr, scale, T and r are GaLore's. Start: the weights as they are;
nothing is added to the model.

Deviations: the official code takes E with the scaled back-projection, so that a part of what is kept leaks
into it; here E is the rest itself. For scale = 1 both agree.
"""

from typing import Any

from ..projected import ProjectedOptimizer
from ..recipes import optimizer
from ..residuals import Scaled
from .galore import galore


@optimizer(
    "fira",
    title="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    year=2024,
    arxiv="2410.01623",
    code="xichen-fy/Fira",
    formula="W <- W - lr (scale P N + E |N_j| / |R_j|), N = adam(R), E = G - P R",
)
def fira(
    params: Any, lr: float = 0.01, *, rank: int = 128, growth: float = 1.01, **options: Any
) -> ProjectedOptimizer:
    """Return the optimizer.

    Args:
        params: a model, (name, parameter) pairs, parameters or groups.
        lr: learning rate.
        rank: r, of the projected gradients, which moments are kept for.
        growth: most that the norm of the rest may grow in a step.
        options: those of `galore`.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.fira(layer, rank=4)
        >>> [group["rank"] for group in optimizer.param_groups]
        [4, None]
    """
    made: ProjectedOptimizer = galore(params, lr, rank=rank, **{"residual": Scaled(growth), **options})
    return made
