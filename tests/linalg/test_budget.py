"""Allocators keep the budget, spend it where it gains most, and treat equals equally."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.errors import InvalidOption, MissingDependency
from rankfold.linalg import allocate, allocators, proportional, top_counts

METHODS = ["greedy", "exact", "threshold"]
Table = list[list[float]]


@st.composite
def tables(draw: st.DrawFn, *, whole: bool = True) -> tuple[Table, Table, float]:
    """Draw ragged costs and gains, and a budget that the first choices fit in."""
    number = st.integers(0, 9) if whole else st.floats(0, 9).map(lambda x: round(x, 3))
    cost, gain = [], []
    for _ in range(draw(st.integers(1, 4))):
        choices = draw(st.integers(1, 4))
        cost.append(list(itertools.accumulate(draw(number) for _ in range(choices))))
        gain.append([draw(st.integers(-5, 20)) for _ in range(choices)])
    least = sum(row[0] for row in cost)
    return cost, gain, least + draw(number) * draw(st.integers(0, 5))


def total(table: Table, chosen: list[int]) -> float:
    return sum(row[pick] for row, pick in zip(table, chosen, strict=True))


def brute_force(cost: Table, gain: Table, budget: float) -> float:
    points = itertools.product(*(range(len(row)) for row in cost))
    return max(total(gain, list(point)) for point in points if total(cost, list(point)) <= budget + 1e-9)


@pytest.mark.parametrize("method", METHODS)
@given(tables())
def test_the_budget_holds_and_nothing_is_lost_against_the_minimum(
    method: str, problem: tuple[Table, Table, float]
) -> None:
    cost, gain, budget = problem
    chosen = allocate(cost, gain, budget, method=method)
    assert total(cost, chosen) <= budget
    assert total(gain, chosen) >= sum(row[0] for row in gain)


@given(tables())
def test_the_exact_method_finds_what_trying_every_point_finds(problem: tuple[Table, Table, float]) -> None:
    cost, gain, budget = problem
    chosen = allocate(cost, gain, budget, method="exact")
    assert total(cost, chosen) <= budget
    assert total(gain, chosen) == brute_force(cost, gain, budget)


@given(tables(whole=False))
def test_costs_that_are_not_integers_are_solved_by_integer_programming(
    problem: tuple[Table, Table, float],
) -> None:
    cost, gain, budget = problem
    chosen = allocate(cost, gain, budget, method="exact")
    assert total(cost, chosen) <= budget + 1e-9
    assert total(gain, chosen) == pytest.approx(brute_force(cost, gain, budget))


@given(tables())
def test_integer_programming_finds_what_dynamic_programming_finds(
    problem: tuple[Table, Table, float],
) -> None:
    cost, gain, budget = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocators, "TABLE_CELLS", 0)
        chosen = allocate(cost, gain, budget, method="exact")
    assert total(cost, chosen) <= budget
    assert total(gain, chosen) == brute_force(cost, gain, budget)


@given(tables())
def test_exact_is_never_below_greedy_and_greedy_never_below_threshold(
    problem: tuple[Table, Table, float],
) -> None:
    exact, greedy, threshold = (
        total(problem[1], allocate(*problem, method=method)) for method in ("exact", "greedy", "threshold")
    )
    assert exact >= greedy
    # Greedy steps run along the same hulls and go on where the threshold stops.
    assert greedy >= threshold or not _concave(problem[1], problem[0])


def _concave(gain: Table, cost: Table) -> bool:
    rows = zip(cost, gain, strict=True)
    return all((np.diff(c) > 0).all() and (np.diff(np.diff(g) / np.diff(c)) <= 0).all() for c, g in rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spare", [0, 3])
def test_equal_weights_get_equal_choices(method: str, spare: int) -> None:
    cost = [[10 * k for k in range(9)]] * 4
    concave = [[float(k) ** 0.5 for k in range(9)]] * 4
    assert allocate(cost, concave, 4 * 50 + spare, method=method) == [5] * 4


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-9, 3e8])
def test_weights_of_one_slope_are_served_in_turn_whatever_the_rounding(scale: float) -> None:
    cost = [[0.1 * k * (i + 1) for k in range(9)] for i in range(3)]
    gain = [[scale * c for c in row] for row in cost]
    chosen = allocate(cost, gain, 0.1 * 12, per="cost")
    spent = [row[pick] for row, pick in zip(cost, chosen, strict=True)]
    assert max(spent) - min(spent) <= 0.3 + 1e-9
    assert allocate(cost, gain, 0.1 * 12, method="threshold") == [0, 0, 0]


@given(tables(), st.integers(0, 20))
def test_a_larger_budget_never_gains_less(problem: tuple[Table, Table, float], more: int) -> None:
    cost, gain, budget = problem
    for method in ("exact", "threshold"):
        less, larger = (total(gain, allocate(cost, gain, b, method=method)) for b in (budget, budget + more))
        assert larger >= less


@given(tables())
def test_a_threshold_keeps_every_step_steeper_than_one_it_took(
    problem: tuple[Table, Table, float],
) -> None:
    cost, gain, budget = problem
    chosen = allocate(cost, gain, budget, method="threshold")
    slopes_in, slopes_out = [], []
    for c, g, pick in zip(cost, gain, chosen, strict=True):
        before, after = range(pick), range(pick + 1, len(c))
        slopes_in += [(g[pick] - g[k]) / (c[pick] - c[k]) for k in before if c[pick] > c[k]]
        slopes_out += [(g[k] - g[pick]) / (c[k] - c[pick]) for k in after if c[k] > c[pick]]
    taken, left = min(slopes_in, default=np.inf), max(slopes_out, default=-np.inf)
    assert taken >= left - 1e-9 or left <= 0


def test_a_gain_that_comes_late_is_seen() -> None:
    cost, gain = [[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 0, 0, 30], [0, 2, 4, 6]]
    for method in METHODS:
        assert allocate(cost, gain, 4, method=method)[0] == 3


def test_greedy_spends_what_is_left_on_a_smaller_step() -> None:
    assert allocate([[0, 5], [0, 2, 4]], [[0, 50], [0, 2, 4]], 8) == [1, 1]


def test_exact_sees_what_greedy_does_not() -> None:
    cost, gain = [[0, 1], [0, 10]], [[0, 2], [0, 15]]
    assert allocate(cost, gain, 10) == [1, 0]
    assert allocate(cost, gain, 10, method="exact") == [0, 1]


@pytest.mark.parametrize("method", ["greedy", "threshold"])
def test_per_choice_a_rank_counts_as_one_whatever_its_width(method: str) -> None:
    cost, gain = [[0, 1, 2], [0, 10, 20]], [[0, 1, 2], [0, 5, 10]]
    assert allocate(cost, gain, 20, method=method) == ([2, 1] if method == "greedy" else [2, 0])
    assert allocate(cost, gain, 20, method=method, per="choice") == [0, 2]


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_falls_below_its_minimum(method: str) -> None:
    cost, gain = [[0, 1, 2, 3]] * 3, [[0, 9, 18, 27], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert allocate(cost, gain, 5, method=method, minimum=1) == [3, 1, 1]
    assert allocate(cost, gain, 6, method=method, minimum=[0, 2, 1]) == [3, 2, 1]


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_take_one_choice_and_cost_what_they_cost_together(method: str) -> None:
    cost, gain = [[0, 1, 2]] * 4, [[0, 10, 11], [0, 4, 5], [0, 10, 11], [0, 3, 3.5]]
    chosen = allocate(cost, gain, 3, method=method, tied=["q", "v", "q", "o"])
    assert chosen == [1, 1, 1, 0]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_gain_is_not_taken_and_one_without_cost_is(method: str) -> None:
    assert allocate([[0, 1], [3, 3]], [[2, 2], [0, 1]], 100, method=method) == [0, 1]


def test_rows_may_be_tensors_and_arrays() -> None:
    assert allocate([torch.tensor([0, 4]), np.array([0, 2])], [torch.tensor([0.0, 1.0]), [0, 1]], 2) == [0, 1]


def test_many_weights_with_costs_in_the_millions_are_solved_exactly() -> None:
    cost = [[rank * width for rank in range(17)] for width in range(768, 768 + 40)]
    gain = [[1 - 0.8**rank * (1 + i % 3) for rank in range(17)] for i in range(40)]
    budget = 40 * 6 * 780
    exact, greedy = (allocate(cost, gain, budget, method=m) for m in ("exact", "greedy"))
    assert total(cost, exact) <= budget
    assert total(gain, exact) >= total(gain, greedy)
    assert total(gain, exact) == pytest.approx(total(gain, greedy), rel=2e-3)


def test_integer_programming_keeps_a_budget_that_its_solver_cannot_tell_from_a_larger_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(allocators, "TABLE_CELLS", 0)
    cost, gain = [[0, 10**9], [0, 1], [0, 2]], [[0, 10], [0, 1], [0, 1]]
    assert allocate(cost, gain, 10**9, method="exact") == [1, 0, 0]
    assert allocate(cost, gain, 10**9 + 1, method="exact") == [1, 1, 0]


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_is_met_to_rounding_is_met(method: str) -> None:
    assert allocate([[0, 0.1]] * 3, [[0, 1]] * 3, 0.3, method=method) == [1, 1, 1]


def test_no_weights_need_no_budget() -> None:
    assert allocate([], [], 0) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (([[1, 2]], [[0, 1]], 0), {}, "the budget 0 is below 1, the cost of the minimum"),
        (([[0, 2]], [[0, 1]], 1), {"minimum": 1}, "the budget 1 is below 2"),
        (([[0, 2]], [[0, 1]], float("nan")), {}, "the budget nan"),
        (([[0, 2]], [[0]], 1), {}, "weight 0: costs of shape"),
        (([[0, 2]], [], 1), {}, "1 rows of costs, 0 of gains"),
        (([[0, 2]], [[0, float("nan")]], 1), {}, "weight 0: costs and gains must be finite"),
        (([[0, 1], [2, 1]], [[0, 1]] * 2, 3), {}, "weight 1: its costs fall"),
        (([[0, 1]], [[0, 1]], 3), {"minimum": 2}, "minimum 2 do not match"),
        (([[0, 1], [0]], [[0, 1], [0]], 3), {"tied": [1, 1]}, "tied as 1 have different numbers"),
        (([[0, 1]], [[0, 1]], 3), {"tied": []}, "0 labels"),
        (([[0, 1]], [[0, 1]], 3), {"per": "rank"}, "per is cost or choice"),
    ],
)
def test_what_cannot_be_allotted_is_refused(
    method: str, arguments: tuple[object, ...], options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        allocate(*arguments, method=method, **options)


def test_an_unknown_method_and_an_order_that_exact_has_not_are_refused() -> None:
    with pytest.raises(InvalidOption, match="method is greedy, exact or threshold"):
        allocate([[0]], [[0]], 0, method="best")
    with pytest.raises(InvalidOption, match="the exact method orders none"):
        allocate([[0]], [[0]], 0, method="exact", per="choice")


def test_without_scipy_integers_are_still_solved_and_others_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert allocate([[0, 2]], [[0, 1]], 2, method="exact") == [1]
    with pytest.raises(MissingDependency, match=r"rankfold\[solvers\]"):
        allocate([[0, 2.5]], [[0, 1]], 3, method="exact")


weights = st.lists(st.floats(0, 100), min_size=1, max_size=8)


@given(weights, st.integers(0, 60), st.integers(0, 3), st.integers(0, 20), st.integers(1, 4))
def test_shares_sum_exactly_keep_their_bounds_and_follow_the_weights(
    wanted: list[float], total_: int, minimum: int, room: int, multiple: int
) -> None:
    least, most = -(-minimum // multiple), (minimum + room + multiple) // multiple
    if least * multiple * len(wanted) > total_:
        with pytest.raises(InvalidOption, match=r"is below .*, the sum of the minima"):
            proportional(wanted, total_, minimum=minimum, multiple=multiple)
        return
    shares = proportional(
        wanted, total_, minimum=minimum, maximum=minimum + room + multiple, multiple=multiple
    )
    assert sum(shares) == multiple * min(total_ // multiple, most * len(wanted))
    assert all(share % multiple == 0 for share in shares)
    assert all(least * multiple <= share <= most * multiple for share in shares)
    for (one, its), (other, others) in itertools.combinations(zip(wanted, shares, strict=True), 2):
        assert (
            (its >= others)
            if one > other
            else (its <= others)
            if one < other
            else abs(its - others) <= multiple
        )


@given(weights, st.integers(0, 60))
def test_without_bounds_a_share_is_its_proportion_to_within_one(wanted: list[float], total_: int) -> None:
    # Weights of less than a millionth of the largest may count as that much.
    wanted = [max(weight, 1e-4) for weight in wanted]
    for weight, share in zip(wanted, proportional(wanted, total_), strict=True):
        assert abs(share - total_ * weight / sum(wanted)) < 1 + 1e-6


@given(weights, st.integers(0, 60), st.sampled_from([0.125, 8.0, 1024.0]))
def test_shares_do_not_depend_on_the_scale_of_the_weights(
    wanted: list[float], total_: int, scale: float
) -> None:
    wanted = [0.0 if weight < 1e-100 else weight for weight in wanted]
    assert proportional([scale * weight for weight in wanted], total_) == proportional(wanted, total_)


def test_equal_weights_share_equally_zeros_included() -> None:
    assert proportional([2.5] * 4, 20) == [5] * 4
    assert proportional([0, 0, 0], 7) == [3, 2, 2]
    assert proportional([], 5) == []


def test_what_the_others_cannot_hold_goes_to_weights_of_zero() -> None:
    assert proportional([1, 0, 0], 10, maximum=4) == [4, 3, 3]


def test_among_faint_weights_too_the_larger_one_comes_first() -> None:
    assert proportional([0, 1e-14, 1], 10, maximum=9) == [0, 1, 9]


def test_bounds_may_differ_by_weight() -> None:
    assert proportional([1, 1, 1], 12, minimum=[6, 0, 0], maximum=[8, 2, 9]) == [6, 2, 4]


@pytest.mark.parametrize(
    ("wanted", "options", "sentence"),
    [
        ([1, -1], {}, "at least 0"),
        ([1, float("nan")], {}, "finite"),
        ([1, 1], {"multiple": 0}, "a multiple of at least 1"),
        ([1, 1], {"minimum": 3, "maximum": 2}, "a maximum is below its minimum"),
        ([1, 1], {"minimum": [1]}, "are not 2 numbers"),
        ([1, 1], {"minimum": 6}, "the total 10 is below 12"),
    ],
)
def test_shares_that_cannot_be_are_refused(
    wanted: list[float], options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        proportional(wanted, 10, **options)


score_rows = st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=5)


@given(score_rows, st.integers(0, 30))
def test_the_counted_scores_are_the_largest_of_all(rows: list[list[int]], budget: int) -> None:
    counts = top_counts(rows, budget)
    ordered = [sorted(row, reverse=True) for row in rows]
    taken = [score for row, count in zip(ordered, counts, strict=True) for score in row[:count]]
    everything = sorted((score for row in rows for score in row), reverse=True)
    assert sorted(taken, reverse=True) == everything[:budget]


@given(score_rows, st.integers(0, 30), st.integers(0, 3), st.integers(0, 3))
def test_counts_keep_their_bounds_and_sum_to_the_budget_where_they_can(
    rows: list[list[int]], budget: int, minimum: int, room: int
) -> None:
    rows = [row + [0] * minimum for row in rows]
    most = [min(len(row), minimum + room) for row in rows]
    if minimum * len(rows) > budget:
        with pytest.raises(InvalidOption, match=r"the budget \d+ is below"):
            top_counts(rows, budget, minimum=minimum)
        return
    counts = top_counts(rows, budget, minimum=minimum, maximum=minimum + room)
    assert sum(counts) == min(budget, sum(most))
    assert all(minimum <= count <= limit for count, limit in zip(counts, most, strict=True))


def test_the_minimum_of_a_weight_is_filled_with_its_own_largest_scores() -> None:
    assert top_counts([[0.1, 0.9], [0.5, 0.4]], 3, minimum=1) == [1, 2]


def test_weights_with_equal_scores_are_counted_equally() -> None:
    assert top_counts([[0.5, 0.5, 0.5]] * 3, 6) == [2, 2, 2]
    assert top_counts([torch.tensor([0.1, 0.9]), np.array([0.9, 0.1])], 2) == [1, 1]


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([[1.0, float("nan")]], {}, "a score is NaN"),
        ([[1.0]], {"minimum": 2}, "a minimum is above"),
        ([[1.0, 2.0]], {"minimum": 2, "maximum": 1}, "a minimum is above"),
        ([[1.0]] * 3, {"minimum": 1}, "the budget 2 is below 3"),
    ],
)
def test_counts_that_cannot_be_are_refused(
    rows: list[list[float]], options: dict[str, int], sentence: str
) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        top_counts(rows, 2, **options)
