"""GaLore: Adam's moments for the gradient in its leading singular directions.

    R = P^T G,   P the r leading left singular vectors of G, chosen anew every T steps
    W <- W - lr scale P adam(R)

Zhao et al. 2024. P stands on the shorter side. Moments are kept as they are when P changes. lr = 0.01,
scale = 0.25, T = 200 and r = 128 are the paper's for its smallest model; embeddings, norms and the head are
moved by plain Adam. Start: the weights as they are; nothing is added to the model.

Deviations: the eps of Adam is 1e-6, as in the official code. Where the first gradient is zero, P is chosen
again in the next step.
"""

from typing import Any

from ..inner import Adam
from ..projected import ProjectedOptimizer
from ..recipes import groups, optimizer


@optimizer(
    "galore",
    title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    year=2024,
    arxiv="2403.03507",
    code="jiaweizzhao/GaLore",
    formula="W <- W - lr scale P adam(P^T G), P the leading singular vectors of G",
)
def galore(
    params: Any,
    lr: float = 0.01,
    *,
    rank: int = 128,
    refresh: int = 200,
    scale: float = 0.25,
    plain: tuple[str, ...] | None = None,
    **options: Any,
) -> ProjectedOptimizer:
    """Return the optimizer.

    Args:
        params: a model, (name, parameter) pairs, parameters or groups.
        lr: learning rate.
        rank: r, of the projected gradients, which moments are kept for.
        refresh: T, steps between two bases.
        scale: of what comes back from the low rank.
        plain: words in the names of weights that are not projected; None means the tables of a
            model's embeddings and heads, and names with "embed" or "lm_head" where no model is given.
        options: further ones of `ProjectedOptimizer`.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.galore(layer, rank=4)
        >>> [group["rank"] for group in optimizer.param_groups]
        [4, None]
    """
    options = {"inner": Adam(eps=1e-6), **options}
    return ProjectedOptimizer(
        groups(params, rank, plain), lr, rank=rank, refresh=refresh, scale=scale, **options
    )
