"""ElaLoRA: every now and then some weights lose their least important terms and others gain as many.

    W = W0 + s P diag(g) Q,   terms scored by smoothed sensitivities as in AdaLoRA

Chang et al. 2025. Every `interval` steps between the shares `warmup` and 1 - `final` of the training, each
weight puts its `pool` least important terms into one pool, never all it has. The b(t) smallest of the pool
are taken away; for each of the b(t) largest its weight gains a term: b and a random of length one, orthogonal
to the weight's other columns and rows, behind a gate of min(min_i |g_i|, 1e-13), with scores and moments of
zero. So the total rank stays, and the weight whose worst terms matter most grows. b(t) is
round(exchange (1 - p^3)), p the progress between the two shares. Pool 2, exchange 4, interval 50 and
beta1 = beta2 = 0.85 are the paper's; `orthogonality` weighs AdaLoRA's penalty, 0.1 in its code. alpha is
divided by the asked rank, whatever remains. Start (`random`): the base, exactly; only g has a gradient there.

Deviations: new directions are orthogonalised against a QR basis of the weight's; projecting with the factors
themselves, as the authors' code does, removes next to nothing, because they are not orthonormal. No more than
half of the pool is taken away at once, so no term is both removed and the reason to grow. A weight does not
grow beyond min(out, in). The penalty takes no part in the scores.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..events import change_terms, gate_of, largest_rank
from ..limits import in_range, leave_steps
from ..registry import ranks
from ..rules import DynamicRanks, Unit
from ..run import Run, TrainedPair
from ..sensitivity import add_orthogonality, remember_scores, scores_of, window

Term = tuple[int, int]  # the number of a weight, and that of a term in it


def fresh_directions(known: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` random orthonormal columns (n, count) orthogonal to the known columns (n, r).

    Args:
        known: columns that need be neither orthogonal nor independent, r + count <= n.
        count: of new columns.
        generator: on the CPU.
    """
    drawn = torch.randn(known.shape[0], count, generator=generator).to(known)
    basis = torch.linalg.qr(known).Q
    for _ in range(2):  # once more, against what rounding leaves
        drawn = torch.linalg.qr(drawn - basis @ (basis.T @ drawn)).Q
    return drawn


def pooled_terms(scores: Sequence[Tensor], pool: int) -> list[Term]:
    """Return the `pool` least important terms of every weight, never all of one, the smallest score first."""
    found = []
    for number, score in enumerate(scores):
        values = score.tolist()
        worst = sorted(range(len(values)), key=values.__getitem__)[: min(pool, len(values) - 1)]
        found += [(values[term], number, term) for term in worst]
    return [(number, term) for _, number, term in sorted(found)]


def growing(pool: Sequence[Term], count: int, room: Mapping[int, int]) -> Counter[int]:
    """Return how many terms every weight gains for the `count` largest entries of the pool that have room."""
    gains: Counter[int] = Counter()
    for number, _ in reversed(pool):
        if gains.total() < count and gains[number] < room[number]:
            gains[number] += 1
    return gains


@ranks(
    "elalora",
    init=("random", {}),
    title="ElaLoRA: Elastic & Learnable Low-Rank Adaptation for Efficient Model Fine-Tuning",
    year=2025,
    arxiv="2504.00254",
    code="HuandongChang/ElaLoRA",
    formula="of every weight's k worst terms take the b(t) worst away, and grow the weights of the b(t) best",
)
@dataclass(kw_only=True)
class ElaLoRA(DynamicRanks):
    """Ranks that move from weight to weight.

    Args:
        pool: terms that every weight puts into the pool, at least 1.
        exchange: terms that the first event takes away and adds, at least 0.
        warmup: share of the training before the first event, in [0, 1).
        final: share of the training after the last event, in [0, 1).
        interval: steps between two events.
        beta1, beta2: of the averages, in [0, 1).
        orthogonality: weight of the penalty, at least 0.
    """

    pool: int = 2
    exchange: int = 4
    warmup: float = 0.1
    final: float = 0.3
    interval: int = 50
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)

    def __post_init__(self) -> None:
        in_range("elalora", "[1, inf)", pool=self.pool, interval=self.interval)
        in_range("elalora", "[0, 1)", beta1=self.beta1, beta2=self.beta2)
        in_range("elalora", "[0, inf)", exchange=self.exchange, orthogonality=self.orthogonality)
        leave_steps("elalora", warmup=self.warmup, final=self.final)

    def share(self, units: Sequence[Unit], rank: int) -> dict[str, int]:
        """Begin with the asked rank, where the weight can hold it."""
        return {unit.path: unit.fitted(rank) for unit in units}

    def gradients_ready(self, run: Run) -> None:
        """Add the penalty's gradient after the scores have seen the loss's."""
        remember_scores(run, run.pairs, self.beta1, self.beta2)
        add_orthogonality(run.pairs, self.orthogonality)

    def stepped(self, run: Run) -> None:
        """Exchange terms."""
        count = self.exchanged(run)
        if count and run.step % self.interval == 0:
            exchange(run, run.pairs, self.pool, count)

    def exchanged(self, run: Run) -> int:
        """Return b(t), zero outside the events' part of the training."""
        begin, end = window(run.total_steps, self.warmup, self.final)
        if not begin < run.step <= end:
            return 0
        return round(self.exchange * (1 - ((run.step - begin) / (end - begin)) ** 3))


def exchange(run: Run, pairs: Sequence[TrainedPair], pool: int, count: int) -> None:
    """Take up to `count` terms away and add as many elsewhere."""
    terms = pooled_terms(scores_of(run, pairs), pool)
    room = {number: max(0, largest_rank(pair) - pair.rank) for number, pair in enumerate(pairs)}
    gains = growing(terms, min(count, len(terms) // 2), room)
    losses = set(terms[: gains.total()])
    for number, pair in enumerate(pairs):
        keep = [term for term in range(pair.rank) if (number, term) not in losses]
        if gains[number] or len(keep) < pair.rank:
            renew(run, pair, torch.tensor(keep, device=pair.up.device), gains[number])


def renew(run: Run, pair: TrainedPair, keep: Tensor, added: int) -> None:
    """Keep some terms of a product and add orthogonal ones behind a gate of next to nothing."""
    if not added:
        change_terms(run, pair, keep)
        return
    up = fresh_directions(pair.up[:, keep], added, run.generator(pair.key, "up"))
    down = fresh_directions(pair.down[keep].T, added, run.generator(pair.key, "down")).T
    gate = gate_of(pair)[keep].abs().min().clamp_max(1e-13).expand(added)
    change_terms(run, pair, keep, up, down, gate)
