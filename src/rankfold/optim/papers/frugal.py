"""FRUGAL: Adam on a small part of every gradient, the sign on all the rest.

    D = P adam(P^T G) + lambda sign(G - P P^T G)

Zmushko et al. 2024. A share `density` of the rows or columns of the shorter side has moments; they are
reset with their step count at every refresh. The basis is random coordinates, so that the two parts have no
entry in common, or "svd" or "orthonormal"; with "blocks" whole weights take turns, in a random order, a
share `density` of them having moments at a time. density = 0.25, refresh = 200, lambda = 1 for pretraining
(0.1 for fine-tuning) and lr = 1e-3 are the paper's. Start: the weights as they are; nothing is added to the
model.
"""

from typing import Any

from torch import Tensor

from ...errors import InvalidOption
from ..blocks import BlockOptimizer
from ..projected import ProjectedOptimizer
from ..recipes import groups, optimizer
from ..residuals import Sign


@optimizer(
    "frugal",
    title="FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
    year=2024,
    arxiv="2411.07837",
    code="fzmushko/FRUGAL",
    formula="W <- W - lr (P adam(P^T G) + lambda sign(G - P P^T G))",
)
def frugal(
    params: Any,
    lr: float = 1e-3,
    *,
    density: float = 0.25,
    refresh: int = 200,
    projector: str = "coordinates",
    sign: float = 1.0,
    plain: tuple[str, ...] | None = None,
    **options: Any,
) -> ProjectedOptimizer:
    """Return the optimizer.

    Args:
        params: a model, (name, parameter) pairs or parameters.
        lr: learning rate.
        density: share of the shorter side, or of the weights, that has moments, in [0, 1]; with 0
            all but the plain ones are moved by signs.
        refresh: steps between two choices of them.
        projector: how they are chosen, or "blocks", where whole weights are.
        sign: lambda, what the sign of the rest is multiplied by.
        plain: words in the names of weights that are moved by Adam alone; None means the tables of a
            model's embeddings and heads, and names with "embed" or "lm_head" where no model is given.
        options: further ones of `ProjectedOptimizer`.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.frugal(layer, density=0.5)
        >>> [group["rank"] for group in optimizer.param_groups]
        [4, None]
    """
    if not 0 <= density <= 1:
        raise InvalidOption(f"frugal: density must be in [0, 1], not {density}")
    made: list[dict[str, Any]] = []
    found = groups(params, 1, plain)
    if any("rank" not in group for group in found):
        raise InvalidOption(
            "frugal makes groups of its own, by density: pass a model or parameters, not groups"
        )
    if projector == "blocks" or density == 0:
        blocks = [
            {**group, "turns": True, "rank": None} if group["rank"] is not None else group for group in found
        ]
        return BlockOptimizer(blocks, lr, density=density, sign=sign, refresh=refresh, **options)
    for group in found:
        pairs = group["params"]
        low = [{"params": [pair], "rank": max(1, round(density * _short(pair[1])))} for pair in pairs]
        made += low if group["rank"] is not None else [group]
    given = {"projector": projector, "residual": Sign(sign), "transport": "reset", **options}
    return ProjectedOptimizer(made, lr, refresh=refresh, **given)


def _short(parameter: Tensor) -> int:
    return min(parameter.shape[0], parameter.numel() // parameter.shape[0])
