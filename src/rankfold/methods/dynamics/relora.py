"""ReLoRA: high-rank training through a sequence of low-rank changes, each merged into the weight.

    every T steps:  W <- W + s B A,   A ~ Kaiming uniform (a = sqrt 5),   B = 0,   moments of A and B pruned

Lialin et al. 2023. B (out, r), A (r, in). After k restarts the change has rank up to k r. At a restart a
share `prune` of every moment is set to zero, at random or where the second moment is smallest (the paper
resets 99.9 % at random, the default), and the learning rate climbs again from zero over `warmup` steps, on
top of whatever schedule there is (`jagged_cosine` is the paper's). T = 1000 and warmup = 50 are the lower
ends of the paper's ranges; its rate is about twice that of full training. Right after a restart B = 0, so
that A has no gradient and B moves first. Start: as the structure's; a restart does not change the model's
function. A residual start, a frozen term, stays what it is: the product is merged, and its start remains
subtracted.

Deviations: the weight that moves is a copy in float32 or better, so that nothing is rounded away and the
model's own stays as it was. All moments of a factor are pruned at the same entries: the official code draws
them apart, and an entry that keeps its first moment and loses the second takes a step of m / eps. With
prune=1 the step count, and with it the bias correction, starts again too. Terms whose gate a rank rule has
closed have nothing to merge and stay as they are, because two factors beside a zero never move again.

Use it where a change of a higher rank than the adapter's is wanted from the memory of one adapter, in a
training that is long enough for several restarts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...optim import moments, reset, second_moments
from ..limits import in_range
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
        warmup: steps over which the learning rate climbs after a restart, in 0..interval.
        prune: share of every moment that a restart sets to zero, in [0, 1].
        magnitude: prune the smallest entries and not random ones.
    """

    interval: int = 1000
    warmup: int = 50
    prune: float = 0.999
    magnitude: bool = False

    def __post_init__(self) -> None:
        in_range("relora", "[1, inf)", interval=self.interval)
        in_range("relora", f"[0, {self.interval}]", warmup=self.warmup)
        in_range("relora", "[0, 1]", prune=self.prune)

    def gradients_ready(self, run: Run) -> None:
        """Warm the learning rate up again after a restart."""
        if run.step >= self.interval:
            warm_up(run, run.step % self.interval, self.warmup)

    def stepped(self, run: Run) -> None:
        """Merge and restart every T steps."""
        if run.step % self.interval == 0:
            for pair in run.pairs:
                restart(run, pair)
                self.prune_moments(run, pair)

    def prune_moments(self, run: Run, pair: TrainedPair) -> None:
        """Set a share of every moment of both factors to zero, all moments at the same entries."""
        for factor, name in ((pair.up, "up"), (pair.down, "down")):
            kept = moments(run.optimizer, factor)
            if self.prune == 1:
                reset(run.optimizer, factor)
            elif kept:
                seconds = second_moments(run.optimizer, factor)
                size = next(iter((seconds or kept).values())).abs()
                order = size if self.magnitude else drawn(run, size, pair.key, name)
                pruned = smallest(order, self.prune)
                for value in kept.values():
                    value.masked_fill_(pruned, 0)


def smallest(order: Tensor, share: float) -> Tensor:
    """Return a mask of the given share of entries, the smallest ones.

    Example:
        >>> import torch
        >>> smallest(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 0.5)
        tensor([[False,  True],
                [ True, False]])
    """
    chosen = order.flatten().argsort(stable=True)[: round(share * order.numel())]
    mask = torch.zeros(order.numel(), dtype=torch.bool, device=order.device)
    mask[chosen] = True
    return mask.view(order.shape)


def warm_up(run: Run, since: int, steps: int) -> None:
    """Let the learning rate of the step about to be taken be since / steps of what it is, if that is less."""
    if since < steps:
        run.scale_rates(since / steps)


def restart(run: Run, pair: TrainedPair) -> None:
    """Move a product into the base and start it again from zero: A Kaiming uniform, B = 0."""
    pair.move_into_base()
    bound = 1 / math.sqrt(pair.down.shape[1])
    fresh = bound * (2 * drawn(run, pair.down, pair.key, "restart") - 1)
    closed = torch.zeros_like(pair.up[0], dtype=torch.bool) if pair.gate is None else pair.gate == 0
    pair.down.copy_(torch.where(closed[:, None], pair.down, fresh))
    pair.up.copy_(torch.where(closed, pair.up, 0))


def drawn(run: Run, like: Tensor, *names: str) -> Tensor:
    """Draw numbers uniform on [0, 1) in the shape of a tensor, alike on every device."""
    return torch.rand(like.shape, generator=run.generator(*names)).to(like)


def jagged_cosine(
    optimizer: Any, *, total: int, interval: int, first_warmup: int, warmup: int, floor: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the paper's schedule for an optimizer that relora does not warm up itself (warmup=0).

        c(t) = floor + (1 - floor) (1 + cos(pi (t - w0) / (N - w0))) / 2,   w0 = first_warmup, N = total
        t < w0: t / w0;   else c(t), but, w1 = warmup,
        t >= T and t mod T < w1: (t mod T) / w1 * c(t - t mod T + w1)

    It climbs to 1 in w0 steps and falls along a cosine to `floor` at step N, where it stays; from step T on,
    every T steps, it starts from zero and is back on the cosine after w1 steps.

    Args:
        optimizer: whose learning rates are multiplied.
        total: N, steps of the training.
        interval: T, steps between restarts.
        first_warmup: w0, of the beginning, below N.
        warmup: w1, after a restart, at most T.
        floor: at the end, in [0, 1].

    Raises:
        InvalidOption: a number is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = jagged_cosine(optimizer, total=100, interval=50, first_warmup=10, warmup=5)
        >>> schedule.get_last_lr()
        [0.0]
    """
    in_range("jagged_cosine", "[1, inf)", interval=interval)
    in_range("jagged_cosine", f"[0, {total})", first_warmup=first_warmup)
    in_range("jagged_cosine", f"[0, {interval}]", warmup=warmup)
    in_range("jagged_cosine", "[0, 1]", floor=floor)

    def cosine(step: int) -> float:
        share = min(1.0, (step - first_warmup) / (total - first_warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

    def factor(step: int) -> float:
        since = step % interval
        if step < first_warmup:
            return step / first_warmup
        if step >= interval and since < warmup:
            return since / warmup * cosine(step - since + warmup)
        return cosine(step)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
