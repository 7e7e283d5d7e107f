"""EGGROLL: evolution strategies with low-rank perturbations, so that a population shares a forward pass.

    W_i = W +- sigma / sqrt(r) A_p B_p^T,   A (out, r), B (in, r) ~ N(0, 1),   + for i = 2p, - for i = 2p + 1
    y_i = W x_i +- sigma / sqrt(r) A_p (B_p^T x_i)
    G = -(1 / sqrt(N)) sum_i f_i (+- sigma / sqrt(r)) A_p B_p^T,   f standardised

Sarkar et al. 2025. N members; W x is one product for all, and G is one product of A's that are weighted by
the difference of a pair's fitness with B's. G is left in `.grad` of the weights, for any optimizer, and
there is no backward pass. Vectors have Gaussian noise of their own. The numbers come from a counter-based
generator, keyed by seed, generation and the parameter's name, and are drawn again where they are needed:
nothing is stored, a population may be evaluated in parts, and a resumed run goes on bit for bit, for the
generation stands in the optimizer's first group. sigma and sqrt(N) are part of what lr means, as in the
official code. r = 1 is usually enough; sigma = 0.01 to 0.2 and N = 64 to 1e5 and more are the paper's
range. Fitness is what is to grow, and is standardised as (f - mean) / sqrt(var + 1e-5), with the mean of
each group of members where there are groups, and the variance of all. Start: the weights as they are.

Deviations: tables of embeddings are perturbed at low rank, by looking up rows of A; the official code has
no such perturbation and they may be frozen. The stream of random numbers is another one than JAX's.
Parameters of layers other than linear, convolution, embedding, LayerNorm and RMSNorm are frozen.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from ...errors import InvalidOption
from ..population import Population
from ..recipes import optimizer


@optimizer(
    "eggroll",
    title="Evolution Strategies at the Hyperscale",
    year=2025,
    arxiv="2511.16652",
    code="ESHyperscale/HyperscaleES",
    formula="G = -(1 / sqrt(N)) sum_i f_i E_i, f_i fitness of W + E_i, E_i = +- sigma / sqrt(r) A_i B_i^T",
    traits={
        "use": "Is called with a model and an optimizer, and needs no backward pass: evaluate the members "
        "under `perturbed()`, then give `step` their fitness.",
        "cost": "A forward pass of all members has r (in + out) multiply-adds more for each token; random "
        "numbers are drawn again and not kept, the estimate is as large as a gradient.",
    },
)
def eggroll(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    population: int = 64,
    rank: int = 1,
    sigma: float = 0.05,
    group: int | None = None,
    reuse: int = 1,
    frozen: tuple[str, ...] = (),
    seed: int = 0,
) -> Population:
    """Return the strategy.

    Args:
        model: whose weights the optimizer holds.
        optimizer: any, which is given the estimate as the gradient.
        population: N, members of a generation, even.
        rank: r, of perturbations.
        sigma: size of perturbations, above 0.
        group: members that share a mean fitness, such as those with the same prompt; None means all.
        reuse: generations that share their noise; 0 keeps one noise for the whole run.
        frozen: words in the names of parameters that are not perturbed.
        seed: of all perturbations.

    Raises:
        InvalidOption: an option is impossible, or nothing can be perturbed.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(4, 2)
        >>> strategy = rf.optim.eggroll(layer, torch.optim.SGD(layer.parameters(), lr=0.1), population=8)
        >>> with strategy.perturbed():
        ...     outputs = layer(strategy.repeated(torch.ones(3, 4)))
        >>> strategy.step(-outputs.view(8, -1).square().mean(1))
    """
    if population < 2 or population % 2 or rank < 1 or not 0 < sigma < float("inf") or reuse < 0:
        raise InvalidOption(
            "eggroll: population must be even and positive, rank at least 1, sigma above 0 and reuse at "
            f"least 0, not {population}, {rank}, {sigma} and {reuse}"
        )
    if group is not None and (group < 2 or population % group):
        raise InvalidOption(f"eggroll: {population} members cannot be shared out to groups of {group}")
    return Population(model, optimizer, population, rank, sigma, group or population, reuse, frozen, seed)
