"""LIFT: train the entries that are largest in a low-rank approximation of the weight.

    W = W0 + kept + scatter(v, S),   S = top-N of |W_f|,   N = min((out + in) rho, out in)

Liu et al. 2025. W_f is the best rank-f approximation of the current weight, rho the rank of the LoRA with as
many numbers. Every `refresh` steps S is chosen anew: entries in both selections keep their moments, new ones
start at zero, the step count goes on, and entries that leave stay as they are (`kept`). Only v (N,) is
trained, so gradient, moments and weight decay are packed. rho = 128 and f = 64 are the paper's for models of
3 to 7 thousand million weights (f = 32 for 1, 128 for 8), refresh = 200 the official code's (400 in the
paper); f is cut to the smaller side. Adam with betas (0.9, 0.95) and no weight decay is the paper's.
Start: the base, exactly, v = 0.

Deviations: v is the change, so a weight decay, which the paper does without, would pull towards the base.
What has left the selection is stored beside it, at most N numbers more after every refresh.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...linalg import truncated_svd
from ...weights import Scattered, Weight
from ..limits import in_range
from ..registry import Shape, structure
from ..rules import Dynamics
from ..run import Run
from ..selected import reselect, scattered, selections
from ..site import Site


def principal(
    weight: Tensor,
    count: int,
    filter_rank: int,
    iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the positions (count,) of the largest magnitudes in the best rank-f approximation, increasing.

    Args:
        weight: (out, in).
        count: N, at most out * in.
        filter_rank: f; the weight itself is taken where f is its smaller side or more.
        iterations: of a randomised decomposition; None is exact.
        generator: for the randomised one.
    """
    filtered = weight
    if filter_rank < min(weight.shape):
        left, values, right = truncated_svd(weight, filter_rank, iterations=iterations, generator=generator)
        filtered = (left * values) @ right
    return filtered.abs().flatten().topk(count).indices.sort().values


@dataclass(kw_only=True)
class LIFT(Dynamics):
    """The selection follows the weight; the options are the structure's."""

    refresh: int = 200
    filter_rank: int = 64
    iterations: int | None = None

    def __post_init__(self) -> None:
        in_range("lift", "[1, inf)", refresh=self.refresh, filter_rank=self.filter_rank)
        in_range("lift", "[0, inf)", iterations=self.iterations)

    def stepped(self, run: Run) -> None:
        """Select again every `refresh` steps."""
        if run.step % self.refresh:
            return
        for path, selection in selections(run).items():
            assert isinstance(selection, Scattered)
            weight, count = run.expressions[path].dense(), selection.values.shape[0]
            weight = weight.to(selection.values.value.dtype)
            reselect(
                run,
                selection,
                principal(weight, count, self.filter_rank, self.iterations, run.generator(path)),
            )


def all_of_it(shape: Shape) -> int:
    """Return the rank at which the whole weight is selected."""
    return -(-shape[0] * shape[1] // sum(shape))


@structure(
    "lift",
    title="LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused "
    "Supervised Fine-Tuning",
    year=2025,
    arxiv="2506.00772",
    code="zihanghliu/LIFT",
    formula="W = W0 + v on the top (out + in) rho entries of |W_f|, W_f of rank f, chosen again and again",
    rank=128,
    limit=all_of_it,
    training=LIFT,
)
def lift(
    site: Site, rank: int, *, filter_rank: int = 64, refresh: int = 200, iterations: int | None = None
) -> Weight:
    """Return W0 and its principal entries.

    Args:
        site: the weight.
        rank: rho; (out + in) rho entries are trained.
        filter_rank: f, of the approximation whose largest entries are selected, at least 1.
        refresh: steps between two selections, at least 1.
        iterations: power iterations of a randomised decomposition; None computes the exact one.
    """
    out, columns = site.shape
    count = min((out + columns) * rank, out * columns)
    if site.blank:
        return site.base + scattered(site, torch.zeros(count, dtype=torch.long))
    generator = None if iterations is None else site.generator("filter")
    return site.base + scattered(site, principal(site.matrix(), count, filter_rank, iterations, generator))
