"""DiLoCo: workers train alone for hundreds of steps and then take one step of Nesterov's momentum together.

    every H steps:  Delta_m = theta - theta_m,   theta <- outer(theta, mean_m Delta_m),   theta_m <- theta

Douillard et al. 2023. theta is where all workers start a round and theta_m where worker m ends it, by any
optimizer of its own, whose state is never exchanged. The outer optimizer is SGD with Nesterov's momentum on
the mean change as if it were a gradient; lr = 0.7, momentum = 0.9 and H = 500 are the paper's. What it
returns stands in the place of the inner optimizer. Workers are the processes of torch.distributed, or take
turns in one process: `exchange=rf.optim.Together(workers)` for all of them, `count()` in the place of the
outer part of `step()`, and `rf.optim.rounds_end(all)` when it says so. All workers start from the same
weights. Start: the weights as they are.

Deviations: none. Factors of a low-rank change must not be trained so: a mean of factors is not the factors
of the mean change.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from ...errors import InvalidOption
from ..outer import Exchange, OuterOptimizer
from ..recipes import optimizer

USE: dict[str, Any] = {
    "use": "Is called with an optimizer, whose place it takes in the training loop of every worker.",
    "cost": "Each worker keeps the weights that it started from, its last change, what is being averaged and "
    "the momentum of the outer step, each as large as the weights, beside the inner optimizer's state.",
}


@optimizer(
    "diloco",
    title="DiLoCo: Distributed Low-Communication Training of Language Models",
    year=2023,
    arxiv="2311.08105",
    formula="theta <- Nesterov(theta, mean_m (theta - theta_m)) every H steps of every worker m",
    traits=USE,
)
def diloco(
    inner: Optimizer,
    lr: float = 0.7,
    *,
    every: int = 500,
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
        >>> optimizer = rf.optim.diloco(torch.optim.AdamW(layer.parameters()), every=2)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """
    return OuterOptimizer(inner, every, nesterov(lr, momentum), "synchronous", exchange)


def nesterov(lr: float, momentum: float) -> Any:
    """Return what makes SGD with Nesterov's momentum, or without any.

    Raises:
        InvalidOption: a rate is negative, or the momentum is not in [0, 1).
    """
    if not (lr >= 0 and 0 <= momentum < 1):
        raise InvalidOption(
            f"the outer lr must be at least 0 and momentum in [0, 1), not {lr} and {momentum}"
        )
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=momentum > 0)
