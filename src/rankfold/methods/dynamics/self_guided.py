"""Self-guided training: a dense map beside a structured one leads its early training and fades away.

    o = alpha_t W x + (1 - alpha_t) S(x),   alpha_t = (1 + cos(pi t / T)) / 2,   T = share * total steps

Wei et al. 2024. S is the map that is trained from scratch, such as low-rank, block-dense or block-shuffle; W
(out, in) is trained beside it from S's own matrix, and at step T it is deleted with the optimizer's state of
it: function and parameters are then those of S alone. share = 0.5 is the paper's; at equal work it takes 0.30
to 0.45 and repeats the tokens of the guided phase at the end. The guide costs out in numbers, their moments
and their products until step T. At step 0 alpha = 1, so that S has no gradient there: weight decay alone
would move it. Start: as the structure's.

With `stochastic` a step uses S alone, with weight 1, unless a number drawn from U(0, 1) is below alpha_t: a
quarter of the guide's work is left, and the output is alpha^2 W x + (1 - alpha^2) S(x) on average. One number
is drawn for all weights of a step; in evaluation the mixture is applied. DistributedDataParallel needs
`find_unused_parameters=True`, because guides are left out and let go.

Deviation: the official code starts the guide of block-shuffle from its two factors multiplied without the
shuffle between them, which is another map; here W = S.

Use it where a structured map that is trained from scratch lags behind a dense one from the beginning on.
"""

import math
from dataclasses import dataclass

import torch

from ...weights import Guided, Weight
from ..limits import in_range
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run
from ..site import Site
from ..stages import leave, staged


@dynamics(
    "self-guided",
    needs=("total_steps",),
    wraps=True,
    title="Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
    year=2024,
    arxiv="2406.16450",
    code="CLAIRE-Labo/StructuredFFN",
    formula="o = alpha W x + (1 - alpha) S(x), alpha falling from 1 to 0 along a cosine, then S alone",
)
@dataclass(kw_only=True)
class SelfGuided(Dynamics):
    """A dense guide.

    Args:
        share: T over the number of steps, in (0, 1].
        stochastic: leave the guide out of a step with probability 1 - alpha.
    """

    share: float = 0.5
    stochastic: bool = False

    def __post_init__(self) -> None:
        in_range("self-guided", "(0, 1]", share=self.share)

    def wrapped(self, site: Site, expression: Weight) -> Weight:
        """Return the weight beside a guide that is its own matrix."""
        guide = site.zeros(*site.shape) if site.blank else expression.dense().detach()
        share = site.frozen(torch.ones(2), "guide.share")
        return Guided(expression, site.trained(guide, "guide"), share)

    def alpha(self, step: int, total: int) -> float:
        """Return the guide's share of a step's output."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / (self.share * total))))

    def stepped(self, run: Run) -> None:
        """Set the share for the next step, or let the guides go."""
        assert run.total_steps is not None
        guided = [part for part in staged(run, Guided).values() if part.guide is not None]
        if run.step >= self.share * run.total_steps:
            for part in guided:
                release(run, part)
        elif guided:
            alpha = self.alpha(run.step, run.total_steps)
            drawn = float(torch.rand((), generator=run.generator()))
            for part in guided:
                part.steer(alpha, self.stochastic and drawn >= alpha)


def release(run: Run, part: Guided) -> None:
    """Delete a guide and the optimizer's state of it."""
    assert part.guide is not None
    leave(run.optimizer, part.guide.value)
    part.release()
