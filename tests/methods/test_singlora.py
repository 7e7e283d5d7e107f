"""SingLoRA: one matrix times its own transpose, ramped in."""

import copy
from pathlib import Path

import pytest
import torch
from methods._layers import adapted, backward, change, count, leaves_of, linear, normal, rank_of
from methods._moving import INPUTS, WANTED, Training, assert_resumes, perceptron

import rankfold as rf
from rankfold.errors import InvalidOption

SOON = rf.Recipe(("singlora", {"ramp": 20}))


def test_a_square_change_stays_symmetric_and_positive() -> None:
    model = adapted("singlora", linear(9, 9), rank=3, ramp=10)
    optimizer = torch.optim.SGD(rf.param_groups(model, lr=0.1))
    x, wanted = normal(20, 9), normal(20, 9, seed=5)
    with rf.attach(model, optimizer):
        for _ in range(15):
            optimizer.zero_grad()
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
            moved = change(model)
            torch.testing.assert_close(moved, moved.T, atol=1e-14, rtol=0)
            assert torch.linalg.eigvalsh(moved).min() >= -1e-12
            assert moved.trace() > 0
    assert rank_of(moved) == 3


@pytest.mark.parametrize(("out", "columns"), [(7, 7), (5, 8), (8, 5)])
def test_the_gradient_is_that_of_the_factor_against_its_own_rows(out: int, columns: int) -> None:
    model = adapted("singlora", linear(out, columns), rank=2, alpha=6.0, ramp=4)
    factor = leaves_of(model)["factor"]
    torch.testing.assert_close(change(model), 3 / 4 * (factor[:out] @ factor[:columns].T).detach())
    dense = backward(model, normal(6, columns))
    expected = torch.zeros_like(factor)
    expected[:out] += 3 / 4 * dense @ factor[:columns]
    expected[:columns] += 3 / 4 * dense.T @ factor[:out]
    torch.testing.assert_close(factor.grad, expected.detach())
    assert count(model) == 2 * max(out, columns)


def test_the_factor_starts_with_a_variance_of_one_over_its_rows() -> None:
    factor = leaves_of(adapted("singlora", linear(40, 400), rank=10))["factor"]
    assert factor.shape == (400, 10)
    assert factor.std().item() == pytest.approx(1 / 400**0.5, rel=0.05)


def test_before_the_first_step_of_the_ramp_both_the_change_and_its_gradient_are_zero() -> None:
    model, x = adapted("singlora", rank=2), normal(5, 8)
    assert leaves_of(model)["ramp"] == pytest.approx(1 / 1000)
    leaves_of(model)["ramp"].zero_()
    assert torch.equal(model(x), linear()(x))
    backward(model, x)
    assert leaves_of(model)["factor"].any()
    assert not leaves_of(model)["factor"].grad.any()


def test_the_ramp_counts_steps_not_forward_passes_and_ends_at_one() -> None:
    training = Training(SOON)
    for step in range(25):
        assert leaves_of(training.model)["ramp"] == pytest.approx(min((step + 1) / 20, 1))
        assert leaves_of(training.model, "2")["ramp"] == leaves_of(training.model)["ramp"]
        training.gradients()
        training.model(training.inputs)
        training.run(1)


def test_folding_before_the_ramp_ends_keeps_the_function_of_that_step() -> None:
    training = Training(SOON)
    training.run(5)
    applied, folded = training.function(), copy.deepcopy(training.model)
    rf.fold(folded)
    torch.testing.assert_close(folded(INPUTS).detach(), applied)


def test_interrupted_training_is_uninterrupted_training(tmp_path: Path) -> None:
    assert_resumes(SOON, tmp_path, stop=7, total=30)


def test_it_learns_through_the_ramp() -> None:
    training = Training(SOON, lr=0.03)
    first = (perceptron()(INPUTS) - WANTED).square().mean()
    assert training.run(60) < 0.8 * first


def test_a_ramp_of_no_step_is_refused() -> None:
    with pytest.raises(InvalidOption, match="ramp must be at least 1 step, not 0"):
        adapted("singlora", rank=2, ramp=0)
