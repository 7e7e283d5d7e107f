"""RankAdaptor: ranks by layer from a small model of how well a configuration does.

    f: (r_1..r_L) -> score,   r_l in the candidates,   sum_l r_l cost_l <= budget

Zhou et al. 2024. For structurally pruned models, whose layers want different ranks. `search` measures a few
configurations (a short fine-tuning and an evaluation each, yours to write), fits f, a multilayer perceptron
of five layers, then measures the best of many predicted ones, adds it to the data and fits again:

    def measure(ranks):
        model = rf.adapt(pruned(), Recipe("lora", ranks=("rankadaptor", {"ranks": ranks})), rank=8)
        ...
        return accuracy

    found = search(measure, costs, budget=8 * sum(costs.values()))

It ends after `rounds`, or when f predicted the chosen configuration's score to within `tolerance`. The
result is the best configuration that was measured. Candidates 2, 4, ..., 12, eight measurements to begin
with, eight rounds of 64 predicted configurations, and 200 epochs of Adam at 1e-2 on three hidden layers of
32 are not confirmed against the paper. Keys may be paths or patterns such as "layers.0.*", the cost then
being that of everything meant. alpha is divided by what a weight itself gets, as in LoRA (the paper sets
alpha = 2r).

Deviations: the uniform configuration is among the first, so that the result is never worse; half of the
predicted configurations are near the best one, because random ones alone miss it in many layers.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import InvalidOption
from ..limits import in_range
from ..registry import ranks
from ..rules import Unit
from ..tables import tabled
from .table import largest_rank

Configuration = tuple[int, ...]  # a position among the candidates, for every layer


@ranks(
    "rankadaptor",
    scales="own",
    largest=largest_rank,
    example={"ranks": {"*": 2}},
    title="RankAdaptor: Hierarchical Rank Allocation for Efficient Fine-Tuning Pruned LLMs via "
    "Performance Model",
    year=2024,
    arxiv="2406.15734",
    formula="r_1..r_L = argmax of a perceptron's predicted score, refined by measuring its choices",
)
def rankadaptor(
    units: Sequence[Unit], rank: int, *, ranks: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the ranks that a search has found.

    Args:
        units: the weights.
        rank: not used.
        ranks: by path or pattern, as `rankfold.methods.ranks.rankadaptor.search` returns them.
    """
    return tabled("rankadaptor", units, ranks, "rankadaptor.search(measure, costs, budget)")


def search(
    measure: Callable[[dict[str, int]], float],
    costs: Mapping[str, float],
    budget: float,
    *,
    candidates: Sequence[int] = (2, 4, 6, 8, 10, 12),
    initial: int = 8,
    rounds: int = 8,
    pool: int = 64,
    tolerance: float = 0.0,
    epochs: int = 200,
    seed: int = 0,
) -> dict[str, int]:
    """Return the best configuration that is measured.

    Args:
        measure: returns the score of ranks by layer, higher is better.
        costs: what one rank costs, by layer, positive; for a weight (out, in) it is out + in.
        budget: the most that ranks times costs may sum to.
        candidates: ranks that a layer may get, rising.
        initial: configurations measured before the first fit, at least 1.
        rounds: configurations chosen by the fit, at least 0.
        pool: configurations predicted for each choice, at least 1.
        tolerance: error of a prediction at which the search ends.
        epochs: of every fit.
        seed: of all random choices.

    Raises:
        InvalidOption: a number is out of range, no configuration fits the budget, or a score is not finite.

    Example:
        >>> search(lambda ranks: -abs(ranks["a"] - 6), {"a": 10, "b": 10}, 160)["a"]
        6
    """
    space = _Space(list(costs.values()), budget, list(candidates), random.Random(seed))
    in_range("rankadaptor's search", "[1, inf)", initial=initial, pool=pool, epochs=epochs)
    in_range("rankadaptor's search", "[0, inf)", rounds=rounds, tolerance=tolerance)
    scores: dict[Configuration, float] = {}

    def take(chosen: Configuration) -> float:
        score = float(measure(dict(zip(costs, space.ranks(chosen), strict=True))))
        if not math.isfinite(score):
            raise InvalidOption(f"rankadaptor: the score of {space.ranks(chosen)} is {score}")
        scores[chosen] = score
        return score

    take(space.uniform())
    for chosen in space.drawn(initial - 1, scores):
        take(chosen)
    for turn in range(rounds):
        predict = _fitted(scores, len(candidates), epochs, seed + turn)
        best = max(scores, key=scores.__getitem__)
        pooled = [*space.drawn(pool - pool // 2, scores), *space.near(best, pool // 2, scores)]
        if not pooled:
            break
        predicted = predict(pooled)
        place = int(predicted.argmax())
        if abs(take(pooled[place]) - float(predicted[place])) <= tolerance:
            break
    best = max(scores, key=scores.__getitem__)
    return dict(zip(costs, space.ranks(best), strict=True))


@dataclass
class _Space:
    """The configurations within a budget."""

    costs: list[float]
    budget: float
    candidates: list[int]
    generator: random.Random = field(repr=False)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in itertools.pairwise([-1, *self.candidates]))
        if not (rising and self.candidates and self.costs) or min(self.costs) <= 0:
            raise InvalidOption(
                "rankadaptor's search needs costs > 0 and candidates that rise from at least 0"
            )
        least = self.candidates[0] * sum(self.costs)
        if least > self.budget:
            raise InvalidOption(
                f"rankadaptor: the budget {self.budget:g} is below {least:g}, what rank {self.candidates[0]} "
                "costs in all layers"
            )

    def ranks(self, chosen: Configuration) -> list[int]:
        """Return the ranks of a configuration."""
        return [self.candidates[position] for position in chosen]

    def fits(self, chosen: Configuration) -> bool:
        """Say whether a configuration is within the budget."""
        return sum(r * c for r, c in zip(self.ranks(chosen), self.costs, strict=True)) <= self.budget

    def uniform(self) -> Configuration:
        """Return the largest configuration with the same rank in all layers."""
        same = [(position,) * len(self.costs) for position in range(len(self.candidates))]
        return max(chosen for chosen in same if self.fits(chosen))

    def repaired(self, chosen: Configuration) -> Configuration:
        """Lower random layers until a configuration is within the budget."""
        positions = list(chosen)
        while not self.fits(tuple(positions)):
            layer = self.generator.choice([i for i, position in enumerate(positions) if position])
            positions[layer] -= 1
        return tuple(positions)

    def drawn(self, count: int, known: Mapping[Configuration, float]) -> list[Configuration]:
        """Return up to so many random configurations, none of them known."""
        top = len(self.candidates)
        return self._fresh(count, known, lambda: tuple(self.generator.randrange(top) for _ in self.costs))

    def near(
        self, best: Configuration, count: int, known: Mapping[Configuration, float]
    ) -> list[Configuration]:
        """Return up to so many configurations that differ from one by a step in a few layers."""

        def moved() -> Configuration:
            positions = list(best)
            for _ in range(self.generator.randint(1, 3)):
                layer = self.generator.randrange(len(positions))
                step = self.generator.choice((-1, 1))
                positions[layer] = min(max(positions[layer] + step, 0), len(self.candidates) - 1)
            return tuple(positions)

        return self._fresh(count, known, moved)

    def _fresh(
        self, count: int, known: Mapping[Configuration, float], draw: Callable[[], Configuration]
    ) -> list[Configuration]:
        found: dict[Configuration, None] = {}
        for _ in range(10 * count):  # where few are left, most draws are known
            if len(found) == count:
                break
            chosen = self.repaired(draw())
            if chosen not in known:
                found[chosen] = None
        return list(found)


def _fitted(
    scores: Mapping[Configuration, float], choices: int, epochs: int, seed: int
) -> Callable[[Sequence[Configuration]], Tensor]:
    """Fit the perceptron to the scores measured so far and return what predicts scores."""
    inputs, wanted = _scaled(list(scores), choices), torch.tensor(list(scores.values()), dtype=torch.float64)
    middle, spread = wanted.mean(), wanted.std(correction=0).clamp_min(1e-12)
    target = ((wanted - middle) / spread).float()[:, None]
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [inputs.shape[1], 32, 32, 32]
        hidden = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(widths)]
        network = nn.Sequential(*(layer for pair in hidden for layer in pair), nn.Linear(32, 1))
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(epochs):
            optimizer.zero_grad()
            nn.functional.mse_loss(network(inputs), target).backward()
            optimizer.step()

    @torch.no_grad()
    def predict(configurations: Sequence[Configuration]) -> Tensor:
        raw: Tensor = network(_scaled(configurations, choices))[:, 0].double()
        return middle + spread * raw

    return predict


def _scaled(configurations: Sequence[Configuration], choices: int) -> Tensor:
    """Return configurations as rows of numbers in [0, 1]."""
    return torch.tensor(configurations, dtype=torch.float32) / max(1, choices - 1)
