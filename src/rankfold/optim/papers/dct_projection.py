"""DCT subspace selection: a basis of the r cosines along which the gradient is largest, without an SVD.

    S = C G,   C the orthonormal DCT-II matrix,   I = the r rows of S with the largest norms,   P = C[I]^T

Modoranu et al. 2025. Only the r indices are kept. They are chosen in every step, and moments follow: those
of a cosine that stays are kept, those of a new one start at zero (`transport="rotate"`). With the l2 norm
the choice is the best of all r of them, and what is lost is at most 1 - r / d of the squared norm. Start:
the weights as they are; nothing is added to the model.

Deviations: ranked by the l2 norm, the official code by l1 (`norm`); without error feedback. S is formed
by a fast transform from 256 rows on, by a product with C below.
"""

from typing import Any

from ..projected import ProjectedOptimizer
from ..projectors import Cosines
from ..recipes import groups, optimizer


@optimizer(
    "dct-projection",
    title="SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
    year=2025,
    arxiv="2505.17967",
    code="IST-DASLab/ISTA-DASLab-Optimizers",
    formula="W <- W - lr P adam(P^T G), P the r cosines with the largest |C G|",
)
def dct_projection(
    params: Any,
    lr: float = 1e-3,
    *,
    rank: int = 128,
    refresh: int = 1,
    norm: str = "l2",
    plain: tuple[str, ...] | None = None,
    **options: Any,
) -> ProjectedOptimizer:
    """Return the optimizer.

    Args:
        params: a model, (name, parameter) pairs, parameters or groups.
        lr: learning rate.
        rank: r, of the projected gradients, which moments are kept for.
        refresh: steps between two choices.
        norm: "l2" or "l1".
        plain: words in the names of weights that are not projected; None means the tables of a
            model's embeddings and heads, and names with "embed" or "lm_head" where no model is given.
        options: further ones of `ProjectedOptimizer`.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.dct_projection(layer, rank=4)
        >>> [group["rank"] for group in optimizer.param_groups]
        [4, None]
    """
    given = {"projector": Cosines(norm), "refresh": refresh, "transport": "rotate", **options}
    return ProjectedOptimizer(groups(params, rank, plain), lr, rank=rank, **given)
