"""PeriodicLoRA (PLoRA): training in stages, each of which unloads the adapter into the weight.

    at the end of a stage:   W <- W + (1 - mu) s B A,   B <- mu B,   A kept            (mu > 0)
                             W <- W + s B A,   A ~ Kaiming uniform,   B = 0            (mu = 0, the default)

Meng et al. 2024. B (out, r), A (r, in). After k full stages the change has rank up to k r; a single stage is
LoRA. With mu = 0 the optimizer's state of both factors starts again, and on request the schedule of the
learning rate does; with mu > 0 nothing is drawn again, the state stays and follows the factor: a gradient of
A is s B^T G, so A's first moments are multiplied by mu and its second ones by mu^2. A stage lasts `interval`
steps, or `share` of the whole training; four stages are the default, where the paper unloads once an epoch or
a fixed part of one. Start: as the structure's; the end of a stage does not change the model's function.

Deviations: the paper's momentum unloading is given in words; this is the form that keeps the function, where
a public one multiplies both factors, W + q s B A + (1-q)^2 s B A, and shrinks the change by q (1-q). The end
of the whole training is the end of a stage only if it falls on one. The weight that moves is a copy in
float32 or better.
"""

from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ...errors import InvalidOption
from ...optim import reset, transform
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run, TrainedPair
from .relora import restart


@dynamics(
    "periodic-lora",
    pairs="terms",
    moves_base=True,
    excludes=("relora",),
    title="PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization",
    year=2024,
    arxiv="2402.16141",
    formula="at the end of a stage: W <- W + (1 - mu) s B A, B <- mu B (mu = 0: A ~ Kaiming, B = 0)",
)
@dataclass(kw_only=True)
class PeriodicLoRA(Dynamics):
    """Stages.

    Args:
        interval: optimizer steps of a stage, at least 1; None takes `share` of the total.
        share: of the whole training that a stage lasts, in (0, 1].
        momentum: mu, the part of the product that stays in the adapter, in [0, 1).
        restart_schedule: begin the learning rate's schedule again with every stage.
    """

    interval: int | None = None
    share: float = 0.25
    momentum: float = 0.0
    restart_schedule: bool = False

    def __post_init__(self) -> None:
        if self.interval is not None and self.interval < 1:
            raise InvalidOption(f"periodic-lora: interval must be at least 1, not {self.interval}")
        if not 0 < self.share <= 1 or not 0 <= self.momentum < 1:
            raise InvalidOption("periodic-lora needs share in (0, 1] and momentum in [0, 1)")

    def check(self, run: Run) -> None:
        """Refuse a training whose length, or whose scheduler, is needed and not known."""
        if self.interval is None and run.total_steps is None:
            raise InvalidOption(
                "periodic-lora needs total_steps: pass total_steps= to attach, or an interval"
            )
        if self.restart_schedule:
            if run.scheduler is None:
                raise InvalidOption("periodic-lora needs scheduler: pass scheduler= to attach")
            _schedule(run.scheduler)

    def length(self, run: Run) -> int:
        """Return how many steps a stage lasts."""
        if self.interval is not None:
            return self.interval
        assert run.total_steps is not None
        return max(1, round(self.share * run.total_steps))

    def stepped(self, run: Run) -> None:
        """Unload the adapter at the end of a stage."""
        if run.step % self.length(run):
            return
        for pair in run.pairs:
            if self.momentum:
                self.unload(run, pair)
            else:
                restart(run, pair)
                reset(run.optimizer, pair.up)
                reset(run.optimizer, pair.down)
        if self.restart_schedule:
            begin_again(run.scheduler, run.optimizer.param_groups)

    def unload(self, run: Run, pair: TrainedPair) -> None:
        """Move a part of a product into the base; A and the optimizer's state stay."""
        mu = self.momentum
        pair.move_into_base((1 - mu) * pair.change())
        pair.up.mul_(mu)
        transform(run.optimizer, pair.down, lambda moment: mu * moment, lambda moment: mu**2 * moment)


def _schedule(scheduler: Any) -> LRScheduler:
    """Return the PyTorch scheduler inside a wrapper such as Accelerate's."""
    while not isinstance(scheduler, LRScheduler) and hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise InvalidOption(
            "periodic-lora begins a schedule over steps again, such as PyTorch's LambdaLR, and "
            f"{type(scheduler).__name__} is none"
        )
    return scheduler


def begin_again(scheduler: Any, groups: list[dict[str, Any]]) -> None:
    """Let a schedule's own next step be its first one, from the rates that it began with."""
    for group in groups:
        if "initial_lr" in group:
            group["lr"] = group["initial_lr"]
    pending = [_schedule(scheduler)]
    while pending:
        schedule = pending.pop()
        schedule.last_epoch = -1  # as before its first step
        pending += getattr(schedule, "_schedulers", [])
