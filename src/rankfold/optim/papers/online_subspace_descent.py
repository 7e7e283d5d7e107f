"""Online Subspace Descent: GaLore whose basis follows the gradient by a step of online PCA after every step.

    W <- W - lr scale P adam(P^T G),   then   P <- P - rate d/dP ||G' - P P^T G'||^2,   G' = G / ||G||

Liang et al. 2024. P starts at the leading singular vectors of the first gradient and is never refreshed. lr
and scale are GaLore's. Start: the weights as they are; nothing is added to the model.

Deviations: P is moved by gradient descent of the given rate, the paper's own default being AdamW at 1 /
200; its penalty on P^T P - I, which the official code leaves out, is left out too, and `orthonormal` makes
P orthonormal every so many steps.
"""

from typing import Any

from ..projected import ProjectedOptimizer
from ..projectors import OnlinePCA
from ..recipes import optimizer
from .galore import galore

_NEVER = 2**31


@optimizer(
    "online-subspace-descent",
    title="Memory-Efficient LLM Training with Online Subspace Descent",
    year=2024,
    arxiv="2408.12857",
    code="kyleliang919/Online-Subspace-Descent",
    formula="W <- W - lr scale P adam(P^T G), P by a step of online PCA after every step",
    status="experimental",
)
def online_subspace_descent(
    params: Any, lr: float = 0.01, *, rank: int = 128, rate: float = 0.1, orthonormal: int = 0, **options: Any
) -> ProjectedOptimizer:
    """Return the optimizer.

    Args:
        params: a model, (name, parameter) pairs, parameters or groups.
        lr: learning rate.
        rank: r, of the projected gradients, which moments are kept for.
        rate: of the basis, for a gradient of norm 1.
        orthonormal: steps between two QR decompositions of the basis; 0 for none.
        options: those of `galore`.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.online_subspace_descent(layer, rank=4)
        >>> [group["rank"] for group in optimizer.param_groups]
        [4, None]
    """
    given = {"projector": OnlinePCA(rate, orthonormal), "refresh": _NEVER, **options}
    made: ProjectedOptimizer = galore(params, lr, rank=rank, **given)
    return made
