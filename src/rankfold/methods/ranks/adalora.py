"""AdaLoRA: gated terms compete over all weights for a budget that falls during training.

    W = W0 + s P diag(g) Q,   S_i = score(g_i) + mean_j score(P_ji) + mean_j score(Q_ij)

Zhang et al. 2023. Every `interval` steps, after the optimizer's, the gates of all but the b(t) terms with the
highest scores of all weights are set to zero. b(t) falls cubically from the initial ranks to the rank that
was asked for times the number of weights, between the shares `warmup` and 1 - `final` of the training; then
the mask is frozen. A masked term keeps P and Q and can return until then. Scores are smoothed sensitivities
(`sensitivity`). The initial rank is 1.5 times the asked one and beta1 = beta2 = 0.85, as in the paper;
`orthogonality` weighs the penalty mean ||P^T P - I||_F, here 0.5 as in common use; interval and shares depend
on the task in the paper. alpha is divided by the initial rank, whatever remains. With the paper's start
(`random`) the step-0 output is the base's, exactly, and only g has a gradient there; factors that an
initialiser takes out of the base start behind gates of one.

Deviations: w and its gradient belong to the same step in |w dL/dw|; the penalty takes no part in it; ties are
cut by order, so exactly b(t) gates stay open. When the handle is removed after the final mask, the closed
terms are taken away, but for one where a weight has no other.

Use it where a total rank should go to the weights that need it most, and training is long enough for a
schedule of warm-up, competition and a last part with fixed masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..events import asked_total, close, close_again, drop_closed, initial_rank, total_rank
from ..limits import in_range, leave_steps
from ..registry import ranks
from ..rules import DynamicRanks, Unit
from ..run import Run
from ..sensitivity import add_orthogonality, cubic_budget, kept_terms, remember_scores, scores_of, window


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
        in_range("adalora", "[1, inf)", initial=self.initial, interval=self.interval)
        in_range("adalora", "[0, 1)", beta1=self.beta1, beta2=self.beta2)
        in_range("adalora", "[0, inf)", orthogonality=self.orthogonality)
        leave_steps("adalora", warmup=self.warmup, final=self.final)

    def share(self, units: Sequence[Unit], rank: int) -> dict[str, int]:
        """Begin with more than was asked for, where the weight can hold it."""
        return {u.path: u.fitted(initial_rank({"initial": self.initial}, rank)) for u in units}

    def gradients_ready(self, run: Run) -> None:
        """Add the penalty's gradient after the scores have seen the loss's."""
        remember_scores(run, run.pairs, self.beta1, self.beta2)
        add_orthogonality(run.pairs, self.orthogonality)

    def stepped(self, run: Run) -> None:
        """Close the gates that are out of the budget."""
        pairs, end = run.pairs, self.phases(run)[1]
        if run.step == end or (run.step < end and run.step % self.interval == 0):
            close(run, pairs, kept_terms(scores_of(run, pairs), self.budget(run)))
        elif run.step > end:
            close_again(run, pairs)

    def finish(self, run: Run) -> None:
        """Take the closed terms away, once they can no longer return."""
        if run.step >= self.phases(run)[1]:
            drop_closed(run)

    def phases(self, run: Run) -> tuple[int, int]:
        """Return the steps at which the budget begins to fall and is down."""
        return window(run.total_steps, self.warmup, self.final)

    def budget(self, run: Run) -> int:
        """Return b(t)."""
        pairs = run.pairs
        first = total_rank(pairs)
        return cubic_budget(run.step, *self.phases(run), first, min(first, asked_total(run, pairs)))
