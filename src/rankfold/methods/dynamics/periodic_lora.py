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

Use it where a change of a higher rank than the adapter's is wanted from the memory of one adapter, in stages.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...optim import reset, transform
from ..limits import in_range
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
        interval: optimizer steps of a stage, at least 1, instead of `share`; None takes that.
        share: of the whole training that a stage lasts, in (0, 1].
        momentum: mu, the part of the product that stays in the adapter, in [0, 1).
        restart_schedule: begin the learning rate's schedule again with every stage.
    """

    interval: int | None = None
    share: float = 0.25
    momentum: float = 0.0
    restart_schedule: bool = False

    def __post_init__(self) -> None:
        in_range("periodic-lora", "[1, inf)", interval=self.interval)
        in_range("periodic-lora", "(0, 1]", share=self.share)
        in_range("periodic-lora", "[0, 1)", momentum=self.momentum)
        if self.interval is not None and self.share != type(self).share:
            raise InvalidOption(
                f"periodic-lora: interval = {self.interval} and share = {self.share} both say how long a "
                "stage lasts; give one of them"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """What `attach` has to be given."""
        return ("total_steps",) * (self.interval is None) + ("scheduler",) * self.restart_schedule

    def begin(self, run: Run) -> None:
        """Remember where the schedule begins."""
        if self.restart_schedule:
            rates = [group["lr"] for group in run.optimizer.param_groups]
            state = {"state": run.scheduler.state_dict(), "rates": rates}
            run.memory("schedule").update(copy.deepcopy(state))

    def gradients_ready(self, run: Run) -> None:
        """Begin the schedule again at the first step of a stage; its own step has come before this."""
        if self.restart_schedule and run.step and run.step % self.length(run) == 0:
            first = copy.deepcopy(run.memory("schedule"))
            run.scheduler.load_state_dict(first["state"])
            _set_rates(run.optimizer.param_groups, first["rates"])

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

    def unload(self, run: Run, pair: TrainedPair) -> None:
        """Move a part of a product into the base; A and the optimizer's state stay."""
        mu = self.momentum
        pair.move_into_base((1 - mu) * pair.change())
        pair.up.mul_(mu)
        transform(run.optimizer, pair.down, lambda moment: mu * moment, lambda moment: mu**2 * moment)


def _set_rates(groups: Sequence[dict[str, Any]], rates: Sequence[Any]) -> None:
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(torch.as_tensor(rate))
        else:
            group["lr"] = rate
