"""ReLoRA: high-rank training through a sequence of low-rank changes, each merged into the weight.

    every T steps:  W <- W + s B A,   A ~ Kaiming uniform (a = sqrt 5),   B = 0,   moments of A and B pruned

Lialin et al. 2023. After k restarts the change has rank up to k r. At a restart the moments are set to zero,
all of them or a random or the smallest-magnitude share `prune` (the paper resets 99.9 % at random, the
default), and the learning rate climbs again from zero over `warmup` steps, on top of whatever schedule there
is (`jagged_cosine` is the paper's). T = 1000 and warmup = 50 are the lower ends of the paper's ranges.
Start: as the structure's; a restart does not change the model's function.

Deviation: the weight that moves is a copy in float32 or better, so the model's own stays as it was.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...optim import moments
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run, TrainedPair


@dynamics(
    "relora",
    pairs="terms",
    moves_base=True,
    title="Stack More Layers Differently: High-Rank Training Through Low-Rank Updates",
    year=2023,
    arxiv="2307.05695",
    code="Guitaricet/relora",
    formula="every T steps: W <- W + s B A, A ~ Kaiming, B = 0, moments pruned, rate warmed up again",
)
@dataclass(kw_only=True)
class ReLoRA(Dynamics):
    """Restarts.

    Args:
        interval: T, optimizer steps between restarts, at least 1.
        warmup: steps over which the learning rate climbs after a restart, at least 0.
        prune: share of every moment that a restart sets to zero, in [0, 1].
        magnitude: prune the smallest entries and not random ones.
    """

    interval: int = 1000
    warmup: int = 50
    prune: float = 0.999
    magnitude: bool = False

    def __post_init__(self) -> None:
        if self.interval < 1 or self.warmup < 0 or not 0 <= self.prune <= 1:
            raise InvalidOption("relora needs interval >= 1, warmup >= 0 and prune in [0, 1]")

    def gradients_ready(self, run: Run) -> None:
        """Warm the learning rate up again after a restart."""
        since = run.step % self.interval
        if run.step >= self.interval and since < self.warmup:
            run.scale_rates(since / self.warmup)

    def stepped(self, run: Run) -> None:
        """Merge and restart every T steps."""
        if run.step % self.interval == 0:
            for pair in run.pairs:
                restart(run, pair)
                self.prune_moments(run, pair)

    def prune_moments(self, run: Run, pair: TrainedPair) -> None:
        """Set a share of every moment to zero."""
        for factor, name in ((pair.up, "up"), (pair.down, "down")):
            for key, value in moments(run.optimizer, factor).items():
                ranked = value.abs() if self.magnitude else drawn(run, value, pair.key, name, key)
                count = round(self.prune * value.numel())
                value.view(-1)[ranked.flatten().argsort()[:count]] = 0


def restart(run: Run, pair: TrainedPair) -> None:
    """Move a product into the base and start it again from zero: A Kaiming uniform, B = 0."""
    pair.move_into_base()
    bound = 1 / math.sqrt(pair.down.shape[1])
    pair.down.copy_(bound * (2 * drawn(run, pair.down, pair.key, "restart") - 1))
    pair.up.zero_()


def drawn(run: Run, like: Tensor, *names: str) -> Tensor:
    """Draw numbers uniform on [0, 1) in the shape of a tensor, alike on every device."""
    return torch.rand(like.shape, generator=run.generator(*names)).to(like)


def jagged_cosine(
    optimizer: Any, *, total: int, interval: int, first_warmup: int, warmup: int, floor: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the paper's schedule for an optimizer that relora does not warm up itself (warmup=0).

    It climbs to 1 in `first_warmup` steps and falls along a cosine to `floor` at step `total`; from step
    `interval` on, every `interval` steps, it starts from zero and is back on the cosine after `warmup` steps.

    Args:
        optimizer: whose learning rates are multiplied.
        total: steps of the training.
        interval: steps between restarts.
        first_warmup: of the beginning.
        warmup: after a restart.
        floor: at the end, in [0, 1].
    """

    def cosine(step: int) -> float:
        share = (step - first_warmup) / max(1, total - first_warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

    def factor(step: int) -> float:
        since = step % interval
        if step < first_warmup:
            return step / first_warmup
        if step >= interval and since < warmup:
            return since / warmup * cosine(step - since + warmup)
        return cosine(step)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
