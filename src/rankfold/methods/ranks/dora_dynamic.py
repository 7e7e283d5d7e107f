"""DoRA with dynamic rank distribution: terms are pruned by their share of their weight's change.

    W = W0 + s B diag(c) A,   s_i = |c_i| ||b_i|| ||a_i|| / (||B diag(c) A||_F + 1e-8)

Mao et al. 2024; not the weight-decomposed DoRA. The shares are averaged over steps with `beta` = 0.9. From a
share `start` of the training until `final` of it is left, every `interval` steps, the gates of the n(t) terms
with the smallest averages of all weights are set to zero, n(t) = (N0 - N) p^3, p the progress from the first
to the last of these steps, N0 the number of terms and N that of the asked ranks; then the mask is frozen.
Between two choices a closed gate may revive. While pruning, the loss has the penalty `equilibrium` times the
mean variance of the entries of every column of B and row of A. The defaults are the paper's: 1.5 times the
asked rank, 15 %, 50 % and 0.1; its interval is 10 to 100 steps. alpha is divided by the initial rank.
Norms are taken of Gram matrices (r, r), never of a product (out, in). Start: c = 0 between two factors drawn
within Kaiming's bounds, so the base, exactly, and only c has a gradient; behind factors that an initialiser
takes out of the base, c = 1.

Deviations: nothing is closed while n(t) is 0, where the authors' code closes one; p starts at 0 with the
pruning. When the handle is removed after the final mask, the closed terms are taken away, but for one where a
weight has no other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..events import asked_total, close, close_again, drop_closed, gate_of, initial_rank, total_rank
from ..limits import in_range, leave_steps
from ..registry import ranks
from ..rules import DynamicRanks, Unit
from ..run import Run, TrainedPair
from ..sensitivity import add_slope, kept_terms, scores_of, window


def norm_shares(up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """Return ||c_i b_i a_i||_F / (||B diag(c) A||_F + 1e-8) for every term (r,).

    Args:
        up: B, (out, r).
        gate: c, (r,).
        down: A, (r, in).

    Example:
        >>> norm_shares(torch.eye(2), torch.tensor([3.0, 4.0]), torch.eye(2))
        tensor([0.6000, 0.8000])
    """
    squares = gate.outer(gate) * (up.T @ up) * (down @ down.T)
    return squares.diagonal().sqrt() / (squares.sum().clamp_min(0).sqrt() + 1e-8)


def variance_slope(vectors: Tensor) -> Tensor:
    """Return the gradient of the variances of the rows (r, n), each over its n entries."""
    return 2 * (vectors - vectors.mean(1, keepdim=True)) / max(1, vectors.shape[1] - 1)


@ranks(
    "dora-dynamic",
    init=("random", {"kaiming": True}),
    largest=initial_rank,
    title="DoRA: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution",
    year=2024,
    arxiv="2405.17357",
    code="MIkumikumi0116/DoRA",
    formula="close the n(t) gates with the smallest ||c_i b_i a_i|| / ||B diag(c) A||",
)
@dataclass(kw_only=True)
class DoRADynamic(DynamicRanks):
    """Terms pruned by their share of the norm.

    Args:
        initial: the rank to begin with, as a multiple of the asked one, at least 1.
        start: share of the training before pruning, in [0, 1).
        final: share of the training after pruning, in [0, 1).
        interval: steps between two choices.
        beta: of the averages, in [0, 1).
        equilibrium: weight of the penalty, at least 0.
    """

    initial: float = 1.5
    start: float = 0.15
    final: float = 0.5
    interval: int = 10
    beta: float = 0.9
    equilibrium: float = 0.1
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)

    def __post_init__(self) -> None:
        in_range("dora-dynamic", "[1, inf)", initial=self.initial, interval=self.interval)
        in_range("dora-dynamic", "[0, 1)", beta=self.beta)
        in_range("dora-dynamic", "[0, inf)", equilibrium=self.equilibrium)
        leave_steps("dora-dynamic", start=self.start, final=self.final)

    def share(self, units: Sequence[Unit], rank: int) -> dict[str, int]:
        """Begin with more than was asked for, where the weight can hold it."""
        return {u.path: u.fitted(initial_rank({"initial": self.initial}, rank)) for u in units}

    def gradients_ready(self, run: Run) -> None:
        """Add the penalty's gradient, while pruning."""
        begin, end = self.phases(run)
        pairs = run.pairs
        if self.equilibrium and begin <= run.step < end:
            weight = self.equilibrium / (2 * total_rank(pairs))
            for pair in pairs:
                add_slope(pair.up, weight * variance_slope(pair.up.T).T)
                add_slope(pair.down, weight * variance_slope(pair.down))

    def stepped(self, run: Run) -> None:
        """Score all terms, and close those that are out of the budget."""
        pairs, (begin, end) = run.pairs, self.phases(run)
        if run.step > end:
            close_again(run, pairs)
            return
        for pair in pairs:
            self.score(run, pair)
        if run.step == end or (run.step > begin and run.step % self.interval == 0):
            close(run, pairs, kept_terms(scores_of(run, pairs), self.budget(run)))

    def finish(self, run: Run) -> None:
        """Take the closed terms away, once they can no longer return."""
        if run.step >= self.phases(run)[1]:
            drop_closed(run)

    def score(self, run: Run, pair: TrainedPair) -> None:
        """Average the shares of a weight's terms."""
        memory, new = run.memory(pair.key), norm_shares(pair.up, gate_of(pair), pair.down)
        old = memory.get("score", torch.zeros_like(new)).to(new)
        memory["score"] = self.beta * old + (1 - self.beta) * new

    def phases(self, run: Run) -> tuple[int, int]:
        """Return the steps at which pruning begins and ends."""
        return window(run.total_steps, self.start, self.final)

    def budget(self, run: Run) -> int:
        """Return how many terms stay open at a step."""
        pairs, (begin, end) = run.pairs, self.phases(run)
        first = total_rank(pairs)
        surplus = max(0, first - asked_total(run, pairs))
        return first - int(surplus * ((run.step - begin) / (end - begin)) ** 3)
