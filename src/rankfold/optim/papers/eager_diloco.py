"""Eager updates: DiLoCo whose workers do not wait: their own change at once, that of the others a round late.

    D_m^t = mean_j Delta_j^{t-1} + (Delta_m^t - Delta_m^{t-1}) / M,   Delta^0 = 0
    theta_m <- outer(theta_m, D_m^t)

Kale, Douillard and Donchev 2025. Delta_m^t is the change of worker m of M in round t (its start minus its
end). The all-reduce of Delta^t is started at the end of round t and consumed at the end of round t+1, so
that it travels while the workers step. Every worker has a theta_m and an outer momentum of its own, and
what is evaluated is their average, `averaged()`. With M = 1 it is DiLoCo; with plain SGD outside, what was
applied until round T is all means until T-1 and this worker's share of T. lr is 0.4 to 0.7 with DiLoCo and
may have to be lower under delay, so 0.4 here; momentum = 0.9; H = 100, of the 30 to some hundreds in use.
`diloco` says how workers are run, in many processes or in one. `update="delayed"` of
`rf.optim.OuterOptimizer` is the naive variant, which applies the last round's mean alone. Start: the
weights as they are.

Deviations: the paper describes the update in words, and the formula above is what they say. Only an overlap
of a whole round is offered.
"""

from __future__ import annotations

from torch.optim import Optimizer

from ..outer import Exchange, OuterOptimizer
from ..recipes import optimizer
from .diloco import USE, nesterov


@optimizer(
    "eager-diloco",
    title="Eager Updates For Overlapped Communication and Computation in DiLoCo",
    year=2025,
    arxiv="2502.12996",
    formula="theta_m <- Nesterov(theta_m, mean_j Delta_j^{t-1} + (Delta_m^t - Delta_m^{t-1}) / M)",
    traits=USE,
)
def eager_diloco(
    inner: Optimizer,
    lr: float = 0.4,
    *,
    every: int = 100,
    momentum: float = 0.9,
    exchange: Exchange | None = None,
) -> OuterOptimizer:
    """Return the optimizer of one worker.

    Args:
        inner: the optimizer that this worker steps alone with.
        lr: outer learning rate.
        every: H, steps of a round.
        momentum: outer, in [0, 1); 0 is plain SGD.
        exchange: with the other workers; None means all processes of torch.distributed.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(4, 4)
        >>> optimizer = rf.optim.eager_diloco(torch.optim.AdamW(layer.parameters()), every=2)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """
    return OuterOptimizer(inner, every, nesterov(lr, momentum), "eager", exchange)
