"""RankAdaptor: a search over ranks by layer with a small model of the score."""

import random
import statistics
from typing import Any

import pytest
import torch
from methods._layers import adapted, leaves_of

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.ranks.rankadaptor import search

COSTS = {f"layers.{i}": 10.0 + i for i in range(6)}
CANDIDATES = (2, 4, 6, 8, 10, 12)
BUDGET = 8 * sum(COSTS.values())


class Measured:
    """A separable score with a known best configuration, which is 0 there, and what was asked of it."""

    def __init__(self, best: dict[str, int]) -> None:
        self.best, self.seen = best, list[tuple[dict[str, int], float]]()

    def __call__(self, ranks: dict[str, int]) -> float:
        score = -float(sum((ranks[layer] - wanted) ** 2 for layer, wanted in self.best.items()))
        self.seen.append((ranks, score))
        return score


def wanted(seed: int) -> dict[str, int]:
    generator = random.Random(f"wanted {seed}")
    while True:
        best = {layer: generator.choice(CANDIDATES) for layer in COSTS}
        if cost(best) <= BUDGET:
            return best


def cost(ranks: dict[str, int]) -> float:
    return sum(COSTS[layer] * rank for layer, rank in ranks.items())


@pytest.mark.parametrize("seed", range(3))
def test_it_returns_the_best_measured_within_the_budget_and_measures_nothing_twice(seed: int) -> None:
    measure = Measured(wanted(seed))
    found = search(measure, COSTS, BUDGET, rounds=4, epochs=50, seed=seed)
    assert measure(found) == max(score for _, score in measure.seen)
    configurations = [tuple(ranks.values()) for ranks, _ in measure.seen[:-1]]
    assert len(configurations) == len(set(configurations)) == 12
    assert all(cost(ranks) <= BUDGET for ranks, _ in measure.seen)


def test_the_uniform_configuration_is_measured_first() -> None:
    measure = Measured(wanted(0))
    search(measure, COSTS, BUDGET, initial=1, rounds=0)
    assert [ranks for ranks, _ in measure.seen] == [dict.fromkeys(COSTS, 8)]


def test_it_finds_more_than_random_search_with_twice_the_measurements() -> None:
    def reached(seed: int, **options: int) -> float:
        measure = Measured(wanted(seed))
        search(measure, COSTS, BUDGET, seed=seed, **options)
        return max(score for _, score in measure.seen)

    ours = statistics.median(reached(seed, initial=8, rounds=16, epochs=40) for seed in range(5))
    blind = statistics.median(reached(seed, initial=48, rounds=0) for seed in range(5))
    assert ours > blind + 8


def test_a_seed_gives_the_same_search_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = [search(Measured(wanted(1)), COSTS, BUDGET, rounds=3, epochs=30, seed=s) for s in (4, 4)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)
    measures = [Measured(wanted(1)) for _ in range(2)]
    for measure, seed in zip(measures, (4, 5), strict=True):
        search(measure, COSTS, BUDGET, rounds=0, seed=seed)
    assert measures[0].seen != measures[1].seen


def test_it_ends_when_a_prediction_is_within_the_tolerance() -> None:
    measure = Measured(wanted(2))
    search(measure, COSTS, BUDGET, initial=5, rounds=9, epochs=20, tolerance=1e9)
    assert len(measure.seen) == 6


def test_it_ends_when_every_configuration_is_known() -> None:
    measure = Measured({"a": 4, "b": 2})
    assert search(measure, {"a": 1, "b": 1}, 6, candidates=(2, 4), initial=9, rounds=9) == {"a": 4, "b": 2}
    assert len(measure.seen) == 3


def test_a_budget_below_the_smallest_configuration_is_refused() -> None:
    with pytest.raises(InvalidOption, match="the budget 100 is below 150, what rank 2 costs in all layers"):
        search(Measured(wanted(0)), COSTS, 100)


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InvalidOption, match=r"the score of \[8, 8, 8, 8, 8, 8\] is nan"):
        search(lambda ranks: float("nan"), COSTS, BUDGET)


@pytest.mark.parametrize(
    "options", [{"initial": 0}, {"rounds": -1}, {"pool": 0}, {"epochs": 0}, {"tolerance": -1.0},
                {"candidates": ()}, {"candidates": (4, 2)}, {"candidates": (-2, 2)}]
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"rankadaptor's search.* {next(iter(options))}"):
        search(Measured(wanted(0)), COSTS, BUDGET, **options)


def test_the_result_is_what_the_rank_rule_takes() -> None:
    found = search(lambda ranks: -abs(ranks["0"] - 4), {"0": 14}, 84)
    model = adapted(rf.Recipe("lora", ranks=("rankadaptor", {"ranks": found})), rank=2, alpha=8)
    assert leaves_of(model)["up"].shape == (6, 4)
    assert next(model[0].expression.pairs()).scale == 2.0


def test_without_a_result_the_rule_names_the_search() -> None:
    with pytest.raises(
        InvalidOption, match=r"rankfold.methods.ranks.rankadaptor.search\(measure, costs, budget\)"
    ):
        adapted("lora/rankadaptor", rank=2)
