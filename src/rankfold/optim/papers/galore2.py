"""GaLore 2: GaLore whose basis is found by a randomised range finder.

    Y = (G G^T)^q G Omega,   Z = qr(Y),   P = Z U_small

Su et al. 2025. One power iteration (q = 1) and eight columns more than the rank are usual, not confirmed
for the paper; here the range starts from the last basis, and without further iterations once there is one.
T, scale and the rest are GaLore's. Start: the weights as they are; nothing is added to the model.
"""

from typing import Any

from ..projected import ProjectedOptimizer
from ..recipes import optimizer
from .galore import galore


@optimizer(
    "galore2",
    title="GaLore 2: Large-Scale LLM Pre-Training by Gradient Low-Rank Projection",
    year=2025,
    arxiv="2504.20437",
    formula="GaLore, P from a randomised range of G that starts at the last P",
)
def galore2(params: Any, lr: float = 0.01, *, rank: int = 128, **options: Any) -> ProjectedOptimizer:
    """Return the optimizer; options are those of `galore`.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.galore2(layer, rank=4)
        >>> [group["rank"] for group in optimizer.param_groups]
        [4, None]
    """
    made: ProjectedOptimizer = galore(params, lr, rank=rank, **{"projector": "randomized", **options})
    return made
