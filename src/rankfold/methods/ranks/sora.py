"""SoRA: a gate over the terms, made sparse by proximal steps of the l1 norm.

    W = W0 + s B diag(g) A,   L + l1 mean|g|,   after every step:  g <- sign(g) max(|g| - xi, 0)

Ding et al. 2023. B, A and g move by the optimizer, g without weight decay; then every gate is shrunk towards
zero by xi, whatever the learning rate. `threshold` = 3e-4 and the smooth term's weight 10 are those of the
authors' code. `stages` raises xi evenly from `threshold` to `last`, stage by stage, as in the paper's study
of memorisation. When training is over the terms whose gate is zero are taken away: an ordinary product of
lower rank, of which one term always stays. alpha is divided by the initial rank, whatever remains.

Start: with a zero product g ~ N(0, 1), and only B has a gradient; behind factors that an initialiser takes
out of the base or moves it by, g = 1.

Deviation: this is the proximal step, of which everything within xi of zero dies. The authors' code shrinks
first and then zeroes |g| < xi, so that everything below 2 xi dies; `dead_zone` does as it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...weights import Leaf
from ..events import drop_closed, gate_of, over, total_rank
from ..limits import in_range
from ..registry import ranks
from ..rules import DynamicRanks, soft_threshold
from ..run import Run, TrainedPair
from ..sensitivity import add_slope
from ..site import Place


def shrunk(gate: Tensor, threshold: float, *, dead_zone: bool = False) -> Tensor:
    """Return the proximal step, or with a dead zone what SoRA's code does instead.

    Example:
        >>> shrunk(torch.tensor([0.15, -0.25]), 0.1), shrunk(torch.tensor([0.15, -0.25]), 0.1, dead_zone=True)
        (tensor([ 0.0500, -0.1500]), tensor([ 0.0000, -0.1500]))
    """
    if not dead_zone:
        return soft_threshold(gate, threshold)
    less = torch.where(gate.abs() > threshold, gate - threshold * gate.sign(), gate)
    return torch.where(less.abs() < threshold, torch.zeros_like(less), less)


def shrink(pairs: Sequence[TrainedPair], threshold: float, *, dead_zone: bool = False) -> None:
    """Take the proximal step of every gate."""
    for pair in pairs:
        gate_of(pair).copy_(shrunk(gate_of(pair), threshold, dead_zone=dead_zone))


def drawn_gate(site: Place, name: str, rank: int, start: str) -> Leaf:
    """Return a gate drawn from N(0, 1) before a product that is zero, else one of ones."""
    drawn = start == "zero" and not site.blank
    return site.trained(site.normal(name, rank) if drawn else site.zeros(rank) + 1, name)


@ranks(
    "sora",
    title="Sparse Low-rank Adaptation of Pre-trained Language Models",
    year=2023,
    arxiv="2311.11696",
    code="TsinghuaC3I/SoRA",
    formula="g <- sign(g) max(|g| - xi, 0) after every step",
)
@dataclass(kw_only=True)
class SoRA(DynamicRanks):
    """Gates under proximal steps.

    Args:
        threshold: xi, what every step takes from |g|, at least 0.
        penalty: weight of mean|g| over all gates in the loss, at least 0.
        last: xi of the last stage, at least `threshold`; None, of a single stage, keeps it.
        stages: equal parts of the training over which xi climbs to `last`; more than one needs the number of
            steps.
        dead_zone: also zero what is left within xi of zero, as the authors' code does.
    """

    threshold: float = 3e-4
    penalty: float = 10.0
    last: float | None = None
    stages: int = 1
    dead_zone: bool = False
    opens: ClassVar[bool] = False  # a gate of zero is put back there by every step that moves it less than xi

    def __post_init__(self) -> None:
        in_range("sora", "[0, inf)", threshold=self.threshold, penalty=self.penalty)
        in_range("sora", "[1, inf)", stages=self.stages)
        in_range("sora", f"[{self.threshold}, inf)", last=self.last)
        if (self.last is None) != (self.stages == 1):
            raise InvalidOption(
                "sora: over several stages the threshold climbs to last: give last and stages > 1, or neither"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """What `attach` has to be given."""
        return ("total_steps",) if self.stages > 1 else ()

    def gate(self, site: Place, name: str, rank: int, start: str) -> Leaf:
        """Return the gate of a product."""
        return drawn_gate(site, name, rank, start)

    def gradients_ready(self, run: Run) -> None:
        """Add the smooth term's gradient, l1 sign(g) / number of gates."""
        pairs = run.pairs
        count = total_rank(pairs)
        for pair in pairs:
            add_slope(gate_of(pair), self.penalty / count * gate_of(pair).sign())

    def stepped(self, run: Run) -> None:
        """Take the proximal step."""
        shrink(run.pairs, self.xi(run), dead_zone=self.dead_zone)

    def finish(self, run: Run) -> None:
        """Take the closed terms away, if training is over."""
        if over(run):
            drop_closed(run)

    def xi(self, run: Run) -> float:
        """Return the threshold of the stage under way."""
        if self.last is None or run.total_steps is None:
            return self.threshold
        stage = min(self.stages - 1, (run.step - 1) * self.stages // run.total_steps)
        return self.threshold + (self.last - self.threshold) * stage / (self.stages - 1)
