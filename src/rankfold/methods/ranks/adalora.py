"""AdaLoRA: gated terms compete over all weights for a budget that falls during training.

    W = W0 + s P diag(g) Q,   S_i = score(g_i) + mean_j score(P_ji) + mean_j score(Q_ij)

Zhang et al. 2023. Every `interval` steps, after the optimizer's, the gates of all but the b(t) terms with the
highest scores of all weights are set to zero; b(t) falls cubically from the initial ranks to the rank that was
asked for times the number of weights, between the shares `warmup` and 1 - `final` of the training; then the
mask is frozen. A masked term keeps P and Q and can return until then. Scores are smoothed sensitivities
(`sensitivity`). The initial rank is 1.5 times the asked one and beta1 = beta2 = 0.85, as in the paper;
`orthogonality` weighs the penalty mean ||P^T P - I||_F, here 0.5 as in common use; interval and shares depend
on the task in the paper. alpha is divided by the initial rank, whatever remains. With the paper's start
(`random`) the step-0 output is the base's, exactly.

Deviations: w and its gradient belong to the same step in |w dL/dw|; ties are cut by order, so exactly b(t)
gates stay open.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import InvalidOption
from ..registry import ranks
from ..rules import DynamicRanks, Unit
from ..run import Run
from ..sensitivity import add_orthogonality, cubic_budget, kept_terms, triplet_scores


def initial_rank(options: Mapping[str, float], rank: int) -> int:
    """Return the rank to begin with."""
    return math.ceil(options["initial"] * rank)


@ranks(
    "adalora",
    init=("random", {}),
    largest=initial_rank,
    title="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    year=2023,
    arxiv="2303.10512",
    code="QingruZhang/AdaLoRA",
    formula="keep the b(t) gates with the highest S_i = s(g_i) + mean s(P_i) + mean s(Q_i)",
)
@dataclass(kw_only=True)
class AdaLoRA(DynamicRanks):
    """A falling budget of gated terms.

    Args:
        initial: the rank to begin with, as a multiple of the asked one, at least 1.
        warmup: share of the training before the budget falls, in [0, 1).
        final: share of the training after it has fallen, in [0, 1).
        interval: steps between two choices.
        beta1, beta2: of the averages, in [0, 1).
        orthogonality: weight of the penalty, at least 0.
    """

    initial: float = 1.5
    warmup: float = 0.1
    final: float = 0.3
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)

    def __post_init__(self) -> None:
        shares = (self.warmup, self.final, self.beta1, self.beta2)
        if self.initial < 1 or self.interval < 1 or self.orthogonality < 0 or not all(0 <= s < 1 for s in shares):
            raise InvalidOption(
                "adalora needs initial >= 1, interval >= 1, orthogonality >= 0, and warmup, final, beta1 and "
                "beta2 in [0, 1)"
            )
        if self.warmup + self.final >= 1:
            raise InvalidOption("adalora: warmup and final leave no steps for the budget to fall")

    def share(self, units: Sequence[Unit], rank: int) -> dict[str, int]:
        """Begin with more than was asked for, where the weight can hold it."""
        return {u.path: u.fitted(initial_rank({"initial": self.initial}, rank)) for u in units}

    def gradients_ready(self, run: Run) -> None:
        """Add the penalty's gradient after the scores have seen the loss's."""
        scores = [triplet_scores(run, pair, self.beta1, self.beta2) for pair in run.pairs]
        for pair, score in zip(run.pairs, scores, strict=True):
            run.memory(pair.key)["score"] = score
        add_orthogonality(run.pairs, self.orthogonality)

    def stepped(self, run: Run) -> None:
        """Close the gates that are out of the budget."""
        begin, end = self.phases(run)
        if run.step > end:
            masks = [run.memory(pair.key)["mask"] for pair in run.pairs]
        elif run.step == end or run.step % self.interval == 0:
            masks = kept_terms([run.memory(p.key)["score"] for p in run.pairs], self.budget(run, begin, end))
        else:
            return
        self.close(run, masks)

    def phases(self, run: Run) -> tuple[int, int]:
        """Return the steps at which the budget begins to fall and is down."""
        assert run.total_steps is not None
        begin = int(self.warmup * run.total_steps)
        return begin, max(begin + 1, int((1 - self.final) * run.total_steps))

    def budget(self, run: Run, begin: int, end: int) -> int:
        """Return b(t)."""
        first, asked = sum(pair.rank for pair in run.pairs), int(run.asked_rank or 1)
        return cubic_budget(run.step, begin, end, first, min(first, asked * len(run.pairs)))

    def close(self, run: Run, masks: Sequence[Tensor]) -> None:
        """Multiply every gate by its mask."""
        for pair, mask in zip(run.pairs, masks, strict=True):
            run.memory(pair.key)["mask"] = mask
            assert pair.gate is not None
            pair.gate.mul_(mask.to(pair.gate.dtype))
