"""IncreLoRA: every weight starts at rank one, and those that matter most gain terms trained in advance.

    W = W0 + s B diag(e) A,   M = sum |dW . dL/dW| / sqrt(out in),   score = I(M) U(M)

Zhang et al. 2023. Beside its terms every weight holds `growth` reserve terms: a, b ~ N(0, 0.02^2), trained
behind gates that are fixed at 1e-5. At an event the `top` weights with the highest smoothed score
(`sensitivity`) gain their reserve: its gates are trained from there on, and fresh reserves follow. When the
total rank is the asked one times the number of weights, the reserves that are left are taken away. A weight
may grow as far as min(out, in), whatever it began with. `growth` is half of the asked rank, as in the paper,
`top` within its 2 to 9, beta1 = beta2 = 0.85; `orthogonality` weighs AdaLoRA's penalty, in the paper 0.1 to
0.3. Events come every `interval` steps (100 to 1000 in the paper) from a share `warmup` of the training on,
by default just as often as needed to be done when `final` of it is left; what is missing then is added at
once. Reserves learn under optimizers that normalise gradients, such as Adam; under plain SGD their gradients
are 1e5 times too small.
Start (`random`): e = 0, so the base, exactly; the reserves enter at the first step and contribute 1e-5 b a.

Deviations: alpha is divided by the asked rank throughout; dividing it by the growing rank of a weight, as the
authors' code does, makes the function jump at every growth. Never more than the asked total is added. dW is
the whole change of the weight, whatever the structure, and under gradient accumulation M is the sum over the
backward passes. Each forms dL/dW of every weight once and keeps one number; `score="factors"` saves that and
takes (sum |B . dL/dB| + sum |A . dL/dA|) / 2 for the sum, which is blind to what the present terms cannot
express. Projections inside `nn.MultiheadAttention` are always scored so. Fresh terms have fresh moments, and
no warm-up of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ...errors import InvalidOption
from ..events import asked_total, change_terms, gate_of, largest_rank
from ..importance import ChangeSensitivity
from ..limits import in_range, leave_steps, one_of
from ..registry import ranks
from ..rules import DynamicRanks, Unit
from ..run import Run, TrainedPair
from ..sensitivity import add_orthogonality, sensitivity, smoothed, window

RESERVE_GATE, RESERVE_STD = 1e-5, 0.02


@ranks(
    "increlora",
    init=("random", {}),
    title="IncreLoRA: Incremental Parameter Allocation Method for Parameter-efficient Fine-tuning",
    year=2023,
    arxiv="2308.12043",
    code="FeiyuZhang98/IncreLoRA",
    formula="weights with the highest |dW . dL/dW| gain terms trained in advance until the budget is spent",
)
@dataclass(kw_only=True)
class IncreLoRA(DynamicRanks):
    """Growing ranks.

    Args:
        initial: the rank that every weight begins with, at least 1 and at most the asked one.
        growth: terms that a weight gains at once, at least 1; None is half of the asked rank.
        top: weights that grow at an event, at least 1.
        interval: steps between two events; None spreads them over the growing part of the training.
        warmup: share of the training before the first event, in [0, 1).
        final: share of the training after the last event, in [0, 1).
        beta1, beta2: of the averages, in [0, 1).
        orthogonality: weight of the penalty, at least 0.
        score: "weights", or "factors", which needs no gradients of weights.
    """

    initial: int = 1
    growth: int | None = None
    top: int = 4
    interval: int | None = None
    warmup: float = 0.1
    final: float = 0.3
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    score: str = "weights"
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)
    alpha_over: ClassVar[str] = "asked"

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("initial", "growth", "top", "interval")}
        in_range("increlora", "[1, inf)", **counts)
        in_range("increlora", "[0, 1)", beta1=self.beta1, beta2=self.beta2)
        in_range("increlora", "[0, inf)", orthogonality=self.orthogonality)
        one_of("increlora", ("weights", "factors"), score=self.score)
        leave_steps("increlora", warmup=self.warmup, final=self.final)

    def share(self, units: Sequence[Unit], rank: int) -> dict[str, int]:
        """Begin with the initial rank, where the weight can hold it."""
        if self.initial > rank:
            raise InvalidOption(
                f"increlora: initial must be at most {rank}, the rank asked for, not {self.initial}"
            )
        return {unit.path: unit.fitted(self.initial) for unit in units}

    def watch(self, run: Run) -> Sequence[RemovableHandle]:
        """Watch the gradients of weights while the handle is there."""
        self._seen = ChangeSensitivity(run) if self.score == "weights" else None
        return [] if self._seen is None else self._seen.handles

    def begin(self, run: Run) -> None:
        """Give every weight its reserve."""
        for pair in run.pairs:
            run.memory(pair.key).update(active=pair.rank, reserve=0)
        run.memory()["first"] = sum(pair.rank for pair in run.pairs)
        for pair in run.pairs:
            self.activate(run, pair, 0)

    def gradients_ready(self, run: Run) -> None:
        """Score every weight; the gates of reserves stay as they are."""
        sums = {} if self._seen is None else self._seen.take()
        for pair in run.pairs:
            memory, slope = run.memory(pair.key), gate_of(pair).grad
            if sums is not None:
                importance = self.importance(pair, sums.get(pair.path))
                memory["score"] = smoothed(memory, "weight", importance, self.beta1, self.beta2)
            if slope is not None:
                slope[memory["active"] :] = 0
        add_orthogonality(run.pairs, self.orthogonality)

    def stepped(self, run: Run) -> None:
        """Let weights grow."""
        for pair in run.pairs:
            gate_of(pair)[run.memory(pair.key)["active"] :] = RESERVE_GATE
        begin, end = window(run.total_steps, self.warmup, self.final)
        if run.step == end:
            while self.missing(run) and self.grow(run, len(run.pairs)):
                pass
            self.drop_reserves(run)
        elif begin < run.step < end and (run.step - begin) % self.spacing(run, begin, end) == 0:
            self.grow(run, self.top)

    def importance(self, pair: TrainedPair, seen: Tensor | None) -> Tensor:
        """Return M, a scalar, from what was seen of the whole weight, or else from the factors."""
        if seen is None:
            seen = (sensitivity(pair.up).sum() + sensitivity(pair.down).sum()) / 2
        return seen.to(pair.up) / math.sqrt(pair.up.shape[0] * pair.down.shape[1])

    def step_size(self, run: Run) -> int:
        """Return how many terms a weight gains at once."""
        return self.growth or max(1, int(run.asked_rank or 1) // 2)

    def spacing(self, run: Run, begin: int, end: int) -> int:
        """Return the steps between two events."""
        if self.interval is not None:
            return self.interval
        needed = asked_total(run, run.pairs) - int(run.memory()["first"])
        events = math.ceil(needed / (self.step_size(run) * min(self.top, len(run.pairs))))
        return max(1, (end - begin) // max(1, events))

    def missing(self, run: Run) -> int:
        """Return how many terms are missing in the budget."""
        pairs = run.pairs
        return asked_total(run, pairs) - sum(int(run.memory(pair.key)["active"]) for pair in pairs)

    def grow(self, run: Run, top: int) -> bool:
        """Let the top weights grow that have room, the most important first; say whether any did."""
        able = [pair for pair in run.pairs if run.memory(pair.key)["reserve"]]
        able.sort(key=lambda pair: -float(run.memory(pair.key).get("score", 0)))
        left = self.missing(run)
        for pair in able[:top]:
            count = min(left, run.memory(pair.key)["reserve"])
            if count:
                self.activate(run, pair, count)
            left -= count
        if not left:
            self.drop_reserves(run)
        return bool(able)

    def activate(self, run: Run, pair: TrainedPair, count: int) -> None:
        """Count the first reserves as terms, and fill the reserve up as far as the weight has room."""
        memory = run.memory(pair.key)
        active = memory["active"] + count
        reserve = max(0, min(self.step_size(run), largest_rank(pair) - active))
        keep = torch.arange(min(pair.rank, active + reserve))
        added = active + reserve - len(keep)
        memory.update(active=active, reserve=reserve)
        drawn = [run.generator(pair.key, side, str(active)) for side in ("up", "down")]
        up = RESERVE_STD * torch.randn(pair.up.shape[0], added, generator=drawn[0])
        down = RESERVE_STD * torch.randn(added, pair.down.shape[1], generator=drawn[1])
        change_terms(run, pair, keep, up, down, torch.full((added,), RESERVE_GATE))

    def drop_reserves(self, run: Run) -> None:
        """Take all reserves away."""
        for pair in run.pairs:
            memory = run.memory(pair.key)
            if memory["reserve"]:
                memory["reserve"] = 0
                change_terms(run, pair, torch.arange(memory["active"]))
