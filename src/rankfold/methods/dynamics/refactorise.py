"""Weight refactorisation and momentum reset: factors balanced by a decomposition of their product.

    every T_f steps:   B A = U S V^T,   B <- U S^(1/2),   A <- S^(1/2) V^T
    every T_m steps:   moments of A and B = 0, step count = 0, the learning rate climbs again

Glentis et al. 2025, a survey of pretraining with W = B A. B (out, r), A (r, in); the decomposition is that of
the triangles of B and A^T, so that the product is never formed and never changes. Afterwards B^T B = A A^T is
diagonal and |B|_F^2 + |A|_F^2 = 2 |B A|_*, the least of all factorisations, so that weight decay acts as
nuclear-norm decay. T_f = T_m = 200, the natural order of such intervals (the paper's are not confirmed), and
ten steps of warm-up. Start: as the structure's.

With B' = B M, A' = N A, gradients become g_B N^T and M^T g_A. Where the moments are not reset at the same
step, first moments are moved so, exactly, and second ones by the squares of N and M, which is exact for
uncorrelated gradients. A product with fewer than r singular values above rounding, such as that of B = 0, is
left as it is, because a term with two zero factors would never move again.
"""

from dataclasses import dataclass

import torch

from ...linalg import squeeze_factors
from ...optim import reset, transform
from ..limits import in_range
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run, TrainedPair
from .relora import warm_up


@dynamics(
    "refactorisation",
    aliases=("refactorize",),
    pairs="parts",
    gates=False,
    status="experimental",
    title="Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and "
    "Benchmarking",
    year=2025,
    arxiv="2505.22922",
    formula="every T_f steps: B A = U S V^T, B <- U S^1/2, A <- S^1/2 V^T; every T_m steps: moments = 0",
)
@dataclass(kw_only=True)
class Refactorisation(Dynamics):
    """Balanced factors.

    Args:
        interval: T_f, optimizer steps between refactorisations, at least 1.
        reset_interval: T_m, steps between resets of the moments, at least 1; None never resets them.
        warmup: steps over which the learning rate climbs after a reset, at least 0.
    """

    interval: int = 200
    reset_interval: int | None = 200
    warmup: int = 10

    def __post_init__(self) -> None:
        intervals = {"interval": self.interval, "reset_interval": self.reset_interval}
        in_range("refactorisation", "[1, inf)", **intervals)
        in_range("refactorisation", "[0, inf)", warmup=self.warmup)

    def gradients_ready(self, run: Run) -> None:
        """Warm the learning rate up again after a reset."""
        if self.reset_interval is not None and run.step >= self.reset_interval:
            warm_up(run, run.step % self.reset_interval, self.warmup)

    def stepped(self, run: Run) -> None:
        """Refactorise and reset where it is time."""
        for pair in run.pairs:
            if run.step % self.interval == 0:
                refactorise(run, pair)
            if self.reset_interval is not None and run.step % self.reset_interval == 0:
                reset(run.optimizer, pair.up)
                reset(run.optimizer, pair.down)


def refactorise(run: Run, pair: TrainedPair) -> None:
    """Balance a product's factors, which the optimizer's moments follow; the product stays what it is."""
    balanced = squeeze_factors(pair.up, pair.down, pair.rank)
    if not bool((torch.linalg.vector_norm(balanced.down, dim=1) > 0).all()):
        return
    to_up, to_down = balanced.down_map.mT, balanced.up_map.mT
    transform(run.optimizer, pair.up, lambda m: m @ to_up.to(m), lambda v: v @ to_up.to(v).square())
    transform(run.optimizer, pair.down, lambda m: to_down.to(m) @ m, lambda v: to_down.to(v).square() @ v)
    pair.up.copy_(balanced.up)
    pair.down.copy_(balanced.down)
