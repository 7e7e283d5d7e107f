"""LIFT: the largest entries of a low-rank approximation train, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import adapted, base, change, expression_of, linear, normal, rank_of
from methods._moving import Training, assert_ends, assert_resumes
from torch import Tensor

import rankfold as rf
from rankfold.errors import InvalidOption, InvalidRank
from rankfold.methods.capacity import RankCapped
from rankfold.methods.structures.lift import principal
from rankfold.weights import Selection


def recipe(**options: Any) -> rf.Recipe:
    return rf.Recipe(("lift", {"filter_rank": 1, **options}))


def selection_of(model: Any, path: str = "0") -> Selection:
    return next(part for part in expression_of(model, path).modules() if isinstance(part, Selection))


def test_it_finds_the_entries_of_a_low_rank_part_under_large_spikes() -> None:
    low_rank = torch.outer(normal(64, seed=3), normal(64, seed=4))
    spikes = torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0))[:100]
    weight = low_rank.flatten().index_add(0, spikes, 8 * normal(100, seed=5).sign()).view(64, 64)
    wanted = set(low_rank.abs().flatten().topk(200).indices.tolist())
    chosen = set(principal(weight, 200, 1).tolist())
    by_size = set(weight.abs().flatten().topk(200).indices.tolist())
    assert len(chosen & wanted) > 0.8 * 200 > 0.6 * 200 > len(by_size & wanted)
    drawn = set(spikes.tolist())
    assert len(chosen & drawn) < 15
    assert len(by_size & drawn) > 90
    generator = torch.Generator().manual_seed(0)
    assert set(principal(weight, 200, 1, 8, generator).tolist()) == chosen


def test_as_many_entries_train_as_a_lora_of_the_rank_has_numbers() -> None:
    model = adapted(recipe(), linear(20, 30), rank=3)
    assert selection_of(model).values.shape == ((20 + 30) * 3,)
    assert selection_of(adapted(recipe(), linear(6, 8), rank=4)).values.shape == (48,)  # all of it


def reference(training: Training, refresh: int, steps: int, lr: float = 1e-2) -> Tensor:
    """Train the first layer densely under a mask, as the paper says it; return its weight."""
    layer, other = training.model[0], training.model[2]
    weight, count = base(training.model).clone(), selection_of(training.model).values.shape[0]
    bias, second = layer._parameters["bias"], expression_of(training.model, "2").dense().detach()
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[principal(weight, count, 1)] = True
    first, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, steps + 1):
        leaf = weight.clone().requires_grad_()
        hidden = torch.tanh(training.inputs @ leaf.T + bias)
        output = hidden @ second.T + other._parameters["bias"]
        (output - training.wanted).square().mean().backward()
        grad = leaf.grad * mask.view_as(weight)  # type: ignore[operator]
        first, square = 0.9 * first + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        scaled = (square / (1 - 0.999**step)).sqrt() + 1e-8
        weight = weight - lr * first / (1 - 0.9**step) / scaled * mask.view_as(weight)
        if step % refresh == 0:
            mask = torch.zeros_like(mask)
            mask[principal(weight, count, 1)] = True
            first, square = first * mask.view_as(weight), square * mask.view_as(weight)
    return weight


def test_training_is_a_sparse_adam_whose_moments_follow_the_selection() -> None:
    training = Training(recipe(refresh=3), lr=3e-2)
    training.model[2].expression.leaf("values").value.requires_grad_(False)
    before = set(selection_of(training.model).positions().tolist())
    wanted = reference(training, 3, 11, lr=3e-2)
    training.run(11)
    after = selection_of(training.model)
    assert before != set(after.positions().tolist())
    assert after.kept.shape[0] > 0
    torch.testing.assert_close(expression_of(training.model).dense(), wanted, rtol=1e-12, atol=1e-12)


def test_moments_are_carried_for_entries_that_stay_and_zero_for_new_ones() -> None:
    training = Training(recipe(refresh=4), lr=0.1)
    training.run(3)
    selection = selection_of(training.model)
    parameter, state = selection.values.value, training.optimizer.state
    training.gradients()
    old, moments = selection.positions().tolist(), {}
    # What the moments are after the fourth step, before anything is selected again, from Adam's rule.
    for name, beta, power in (("exp_avg", 0.9, 1), ("exp_avg_sq", 0.999, 2)):
        value = beta * state[parameter][name] + (1 - beta) * parameter.grad**power  # type: ignore[operator]
        moments[name] = dict(zip(old, value.tolist(), strict=True))
    training.optimizer.step()
    new = selection.positions().tolist()
    assert set(new) != set(old)
    assert state[parameter]["step"] == 4
    for name, values in moments.items():
        wanted = torch.tensor([values.get(position, 0.0) for position in new], dtype=torch.float64)
        torch.testing.assert_close(state[parameter][name], wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1),
    ],
)
def test_entries_outside_of_the_selection_never_move_under_momentum_and_decay(make: Any) -> None:
    training = Training(
        recipe(refresh=5), make=lambda groups: make([{"params": g["params"]} for g in groups])
    )
    last, outside = None, None
    for _ in range(15):
        training.run(1)
        weight = expression_of(training.model).dense().detach()
        if last is not None:
            assert torch.equal(weight.flatten()[outside], last.flatten()[outside])
        last, outside = weight, torch.ones(weight.numel(), dtype=torch.bool)
        outside[selection_of(training.model).positions().long()] = False
    left = set(selection_of(training.model).kept_index.value.tolist())
    assert left
    assert torch.equal(base(training.model), Training(recipe()).model[0].matrix())  # W0 itself is not edited


def test_gradient_and_moments_are_packed_to_the_selection() -> None:
    training = Training(recipe())
    training.run(2)
    for path in ("0", "2"):
        selection = selection_of(training.model, path)
        count, size = selection.values.shape[0], expression_of(training.model, path).shape
        assert count == 2 * sum(size) < size[0] * size[1]
        parameter = selection.values.value
        held = [v for v in training.optimizer.state[parameter].values() if v.dim()]
        assert [v.numel() for v in held] == [count, count]  # a dense Adam keeps 2 out in
        assert parameter.grad is not None
        assert parameter.grad.numel() == count
        assert selection.support[0].value.element_size() == 4


def test_the_change_has_a_rank_far_above_that_of_a_lora_with_as_many_numbers() -> None:
    training = Training(recipe(), rank=3)
    training.run(5)
    assert rank_of(change(training.model)) > 2 * 3


def test_it_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    assert_resumes(recipe(refresh=5), tmp_path)
    assert_resumes(recipe(refresh=5, iterations=1), tmp_path / "randomised", make=torch.optim.AdamW)


def test_folding_and_removal_hold_after_the_selection_has_changed() -> None:
    training = Training(recipe(refresh=3))
    training.run(10)
    assert_ends(training)


def test_a_selection_larger_than_the_weight_is_refused_and_a_default_is_cut() -> None:
    with pytest.raises(
        InvalidRank, match=r"0: rank 5 is more .* \(6x8\) can hold with lift; choose rank <= 4"
    ):
        adapted(recipe(), rank=5)
    with pytest.warns(RankCapped, match="0: rank capped to 4"):
        rf.adapt(linear(), recipe())
    with pytest.raises(InvalidOption, match="lift: refresh must be at least 1, not 0"):
        adapted(recipe(refresh=0), rank=2)
