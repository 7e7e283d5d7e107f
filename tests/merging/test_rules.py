"""What defines each rule that works tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankfold import catalogue
from rankfold.errors import InvalidOption
from rankfold.merging.consensus import agreeing_mean
from rankfold.merging.papers.breadcrumbs import breadcrumbs
from rankfold.merging.papers.dare import dare_linear, dare_ties, dropped, mask
from rankfold.merging.papers.linear import linear
from rankfold.merging.papers.slerp import slerp
from rankfold.merging.papers.task_arithmetic import task_arithmetic
from rankfold.merging.papers.ties import ties, trimmed
from rankfold.merging.parts import Parts
from rankfold.merging.sparsify import keep_band, keep_largest

BY_TENSOR = [
    method.name
    for method in catalogue.methods("merge")
    if not method.traits["whole"] and method.name in {"linear", "task-arithmetic", "ties", "dare-linear"}
    | {"dare-ties", "breadcrumbs"}
]  # fmt: skip


def parts(
    count: int = 3, shape: tuple[int, ...] = (6, 5), weights: tuple[float, ...] = (), seed: int = 0
) -> Parts:
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(count + 1)]
    return Parts("w", tuple(tensors[1:]), weights or (1.0,) * count, tensors[0], seed)


@pytest.mark.parametrize("name", BY_TENSOR)
def test_a_rule_changes_none_of_its_inputs(name: str) -> None:
    given_parts = parts()
    before = [tensor.clone() for tensor in (*given_parts.models, given_parts.origin)]
    catalogue.get("merge", name).build(given_parts)
    after = (*given_parts.models, given_parts.origin)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 4)])
@pytest.mark.parametrize("name", BY_TENSOR)
def test_a_rule_takes_tensors_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    merged = catalogue.get("merge", name).build(parts(shape=shape))
    assert merged.shape == shape
    assert merged.isfinite().all()


def test_the_average_of_models_is_task_arithmetic_with_weights_that_sum_to_one() -> None:
    thirds = parts(weights=(1 / 3, 1 / 3, 1 / 3))
    torch.testing.assert_close(task_arithmetic(thirds), linear(parts()))
    torch.testing.assert_close(linear(parts()), torch.stack(parts().models).mean(0))


def test_linear_divides_by_the_sum_of_the_weights_unless_told_otherwise() -> None:
    some = parts(weights=(1.0, 2.0, 5.0))
    total = sum(w * m for w, m in zip(some.weights, some.models, strict=True))
    torch.testing.assert_close(linear(some), total / 8)
    torch.testing.assert_close(linear(some, normalize=False), total)
    with pytest.raises(InvalidOption, match="the weights sum to zero"):
        linear(parts(2, weights=(1.0, -1.0)))


def test_keeping_the_largest_keeps_exactly_as_many_also_among_equals() -> None:
    tensor = torch.tensor([[2.0, -2.0, 2.0], [1.0, 2.0, 3.0]])
    assert keep_largest(tensor, 3).tolist() == [[2.0, -2.0, 0.0], [0.0, 0.0, 3.0]]
    for each in (tensor, tensor.T, tensor.double(), tensor.to(torch.float64).T):
        assert [int((keep_largest(each, count) != 0).sum()) for count in range(7)] == list(range(7))
    assert keep_largest(tensor.T, 3).tolist() == [[2.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30), st.data())
def test_what_is_kept_of_a_tensor_is_no_smaller_than_what_is_not(values: list[float], data: Any) -> None:
    tensor = torch.tensor(values)
    count = data.draw(st.integers(0, len(values)))
    result = keep_largest(tensor, count)
    kept = result != 0
    assert int(kept.sum()) == min(count, int((tensor != 0).sum()))
    assert torch.equal(result[kept], tensor[kept])
    if kept.any() and not kept.all():
        assert tensor[kept].abs().min() >= tensor[~kept].abs().max()


# ties


def test_ties_of_one_model_of_which_all_is_kept_is_that_model() -> None:
    one = parts(1)
    torch.testing.assert_close(ties(one, density=1.0), one.models[0])


def test_ties_of_two_opposite_changes_keeps_the_larger_of_each_entry() -> None:
    up, down = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([-1.0, -4.0, -2.5])
    merged = ties(Parts("w", (up, down), (1.0, 1.0), torch.zeros(3)), density=1.0)
    assert merged.tolist() == [3.0, -4.0, -2.5]


def test_ties_averages_over_those_that_agree_and_not_over_trimmed_zeros() -> None:
    models = torch.tensor([[4.0, 0.1, 2.0], [2.0, 3.0, 0.1], [-1.0, 2.0, 0.2]])
    merged = ties(Parts("w", tuple(models), (1.0,) * 3, torch.zeros(3)), density=0.7)
    assert merged.tolist() == [3.0, 2.5, 2.0]


def test_a_sum_of_zero_elects_plus() -> None:
    change = torch.tensor([2.0])
    assert agreeing_mean((change, -change), (1.0, 1.0), "count").tolist() == [2.0]


def test_ties_trims_each_tensor_to_its_density_and_leaves_one_entry_at_least() -> None:
    change = torch.randn(50)
    assert int((trimmed(change, 0.2) != 0).sum()) == 10
    assert int((trimmed(change, 0.001) != 0).sum()) == 1
    assert not trimmed(change, 0.0).any()
    assert trimmed(change, 0.001).abs().max() == change.abs().max()


def test_a_common_factor_of_the_weights_means_nothing_to_a_weighted_mean() -> None:
    some, more = parts(weights=(1.0, 2.0, 3.0)), parts(weights=(10.0, 20.0, 30.0))
    torch.testing.assert_close(ties(some), ties(more))
    assert not torch.allclose(ties(some, mean="count"), ties(more, mean="count"))


def test_the_means_differ_in_when_weights_are_multiplied_and_what_divides() -> None:
    changes, weights = (torch.tensor([1.0]), torch.tensor([-2.0])), (3.0, 1.0)
    assert agreeing_mean(changes, weights, "weighted").tolist() == [1.0]  # 3 against 2: plus; 3 / 3
    assert agreeing_mean(changes, weights, "sum").tolist() == [3.0]
    assert agreeing_mean(changes, weights, "count").tolist() == [-2.0]  # 1 against 2: minus; -2 / 1
    with pytest.raises(InvalidOption, match="mean must be one of"):
        agreeing_mean(changes, weights, "median")


def test_ties_scales_the_mean_and_each_model_may_have_its_density() -> None:
    some = parts()
    torch.testing.assert_close(ties(some, scale=0.5) - some.origin, 0.5 * (ties(some) - some.origin))
    only_first = ties(some, density=(1.0, 0.0, 0.0))
    torch.testing.assert_close(only_first, some.models[0])
    with pytest.raises(InvalidOption, match="density has 2 values for 3 models"):
        ties(some, density=(1.0, 0.5))
    with pytest.raises(InvalidOption, match=r"density must lie in 0\.\.1"):
        ties(some, density=1.5)


# dare


@pytest.mark.parametrize("rule", [dare_linear, dare_ties])
def test_what_dare_keeps_is_the_change_on_average(rule: Callable[..., Tensor]) -> None:
    one = parts(1, shape=(200, 200))
    merged = rule(one, density=0.25) - one.origin
    change = one.deltas[0]
    share = (merged != 0).double().mean()
    assert abs(float(share) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / change.numel())
    torch.testing.assert_close(merged[merged != 0], 4 * change[merged != 0])
    spread = float(change.square().sum() * 3) ** 0.5  # of the sum of what is kept
    assert abs(float(merged.sum() - change.sum())) < 4 * spread


def test_dare_draws_another_mask_for_each_model_tensor_and_seed_and_the_same_again() -> None:
    some, again, other = parts(shape=(20, 20)), parts(shape=(20, 20)), parts(shape=(20, 20), seed=1)
    renamed = Parts("v", some.models, some.weights, some.base, some.seed)
    first = mask(some, 0, 0.5)
    assert torch.equal(first, mask(again, 0, 0.5))
    assert not torch.equal(first, mask(some, 1, 0.5))
    assert not torch.equal(first, mask(other, 0, 0.5))
    assert not torch.equal(first, mask(renamed, 0, 0.5))


def test_dare_rescales_by_the_density_or_to_the_sum_of_magnitudes_or_not() -> None:
    one = parts(1, shape=(30, 30))
    by_density, by_sum, plain = (dropped(one, (0.5,), how)[0] for how in ("density", "l1", "none"))
    torch.testing.assert_close(by_density, 2 * plain)
    torch.testing.assert_close(by_sum.abs().sum(), one.deltas.abs().sum())
    assert torch.equal(plain[plain != 0], one.deltas[0][plain != 0])
    with pytest.raises(InvalidOption, match="rescale must be"):
        dare_linear(one, rescale="l2")


def test_dare_that_keeps_all_is_the_rule_without_it() -> None:
    some = parts(weights=(0.2, 0.5, 0.4))
    torch.testing.assert_close(dare_linear(some, density=1.0), task_arithmetic(some))
    torch.testing.assert_close(dare_ties(some, density=1.0), ties(some, density=1.0))


# breadcrumbs


@given(st.integers(1, 60), st.sampled_from([0.0, 0.01, 0.1, 0.3]), st.sampled_from([0.0, 0.25, 0.5, 0.7]))
def test_breadcrumbs_keeps_a_band_of_exactly_the_size_that_is_left(
    size: int, high: float, low: float
) -> None:
    change = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    one = Parts("w", (change,), (1.0,), torch.zeros_like(change))
    merged = breadcrumbs(one, drop_smallest=low, drop_largest=high, scale=1.0)
    kept = merged != 0
    # In whole numbers: what a fraction of a hundredth drops.
    dropped_low, dropped_high = round(low * 100) * size // 100, round(high * 100) * size // 100
    assert int(kept.sum()) == size - dropped_high - dropped_low
    assert torch.equal(merged[kept], change[kept])
    removed = change[~kept].abs().sort().values
    if kept.any() and dropped_high:
        assert change[kept].abs().max() <= removed[-dropped_high]
    if kept.any() and dropped_low:
        assert change[kept].abs().min() >= removed[dropped_low - 1]


def test_breadcrumbs_that_drops_nothing_is_task_arithmetic() -> None:
    some = parts(weights=(0.2, 0.5, 0.4))
    merged = breadcrumbs(some, drop_smallest=0.0, drop_largest=0.0, scale=0.7)
    torch.testing.assert_close(merged, task_arithmetic(some, scale=0.7))


def test_one_huge_outlier_is_removed_by_breadcrumbs_and_kept_by_trimming() -> None:
    change = torch.linspace(0.1, 1, 100)
    change[7] = 1e6
    one = Parts("w", (change,), (1.0,), torch.zeros(100))
    assert breadcrumbs(one).max() < 1
    assert ties(one).max() == 1e6


def test_a_tensor_too_small_for_a_top_cut_keeps_the_rest_of_its_change() -> None:
    bias = torch.arange(1.0, 9.0)
    merged = breadcrumbs(Parts("b", (bias,), (1.0,), torch.zeros(8)), drop_smallest=0.5, scale=1.0)
    assert merged.tolist() == [0, 0, 0, 0, 5, 6, 7, 8]


def test_breadcrumbs_refuses_to_drop_more_than_all() -> None:
    with pytest.raises(InvalidOption, match="more than all"):
        breadcrumbs(parts(), drop_smallest=0.9, drop_largest=0.2)
    assert not keep_band(torch.ones(4), 2, 2).any()


# slerp


def test_slerp_starts_at_the_first_and_ends_at_the_second() -> None:
    two = parts(2)
    torch.testing.assert_close(slerp(two, t=0.0), two.models[0])
    torch.testing.assert_close(slerp(two, t=1.0), two.models[1])


@given(st.floats(0, 1))
def test_slerp_of_tensors_of_one_norm_keeps_it_and_divides_the_angle(t: float) -> None:
    first, second = (m / m.norm() for m in parts(2).models)
    merged = slerp(Parts("w", (first, second), (1.0, 1.0)), t=t)
    angle = torch.acos((first * second).sum())
    torch.testing.assert_close(merged.norm(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close((merged * first).sum(), torch.cos(t * angle))


def test_slerp_of_parallel_opposite_or_zero_tensors_is_linear() -> None:
    first = parts(1).models[0]
    for second in (2 * first, -first, torch.zeros_like(first)):
        merged = slerp(Parts("w", (first, second), (1.0, 1.0)), t=0.25)
        expected = 0.75 * first + 0.25 * second if second.any() else math.sin(0.75 * math.pi / 2) * first
        torch.testing.assert_close(merged, expected)


def test_slerp_takes_its_place_from_the_weights() -> None:
    torch.testing.assert_close(slerp(parts(2, weights=(1.0, 3.0))), slerp(parts(2), t=0.75))
    with pytest.raises(InvalidOption, match="no place between the models"):
        slerp(parts(2), t=1.5)
    with pytest.raises(InvalidOption, match="two models, not 3"):
        slerp(parts(3))
