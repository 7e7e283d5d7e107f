"""SARA (importance sampling): GaLore whose basis is drawn from all singular vectors, the larger the likelier.

    P = U[:, I],   I: r of min(m, n) without replacement, with probabilities sigma_i / sum sigma

Zhang et al. 2025. A full decomposition at every refresh; subspaces stop freezing. T, scale and the rest are
GaLore's. SaRA, on sparse entries, is another method. Start: the weights as they are; nothing is added to the
model.
"""

from typing import Any

from ..projected import ProjectedOptimizer
from ..recipes import optimizer
from .galore import galore


@optimizer(
    "sara-sampling",
    title="Breaking the Frozen Subspace: Importance Sampling for Low-Rank Optimization in LLM Pretraining",
    year=2025,
    arxiv="2502.05790",
    formula="GaLore, P drawn from the singular vectors of G with probabilities by singular value",
)
def sara_sampling(params: Any, lr: float = 0.01, *, rank: int = 128, **options: Any) -> ProjectedOptimizer:
    """Return the optimizer; options are those of `galore`, such as transport="rotate".

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.sara_sampling(layer, rank=4)
        >>> [group["rank"] for group in optimizer.param_groups]
        [4, None]
    """
    made: ProjectedOptimizer = galore(params, lr, rank=rank, **{"projector": "sampled", **options})
    return made
