"""Refactorisation: balanced factors of the same product."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import normal
from methods._moving import Training, assert_ends, assert_resumes, dynamics_of, event, recipe

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.dynamics.refactorise import refactorise


def refactorisation(structure: Any = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    defaults = {"interval": 5, "reset_interval": None, "warmup": 0}
    return recipe("refactorisation", structure, init, **(defaults | options))


def unbalanced(training: Training, factor: float = 10.0) -> None:
    with torch.no_grad():
        for pair in training.started.pairs:
            pair.up.mul_(factor)
            pair.down.div_(factor)


@pytest.mark.parametrize("structure", ["lora", "dora", "hira", "abba"])
def test_the_product_and_the_function_stay_what_they_are(structure: str) -> None:
    training = Training(refactorisation(structure))
    training.run(4)
    unbalanced(training)
    dynamics_of(training, "refactorisation")
    up, product = training.pair.up.detach().clone(), training.pair.change()
    before, after = event(
        training, lambda: [refactorise(training.started, p) for p in training.started.pairs]
    )
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(training.pair.change(), product)
    assert not torch.allclose(training.pair.up, up)


def test_the_factors_are_balanced_and_as_small_as_any() -> None:
    training = Training(refactorisation())
    training.run(4)
    unbalanced(training)
    training.run(1)
    up, down = training.pair.up.detach(), training.pair.down.detach()
    values = torch.linalg.svdvals(up @ down)[:2]
    torch.testing.assert_close(up.T @ up, torch.diag(values))
    torch.testing.assert_close(down @ down.T, torch.diag(values))
    torch.testing.assert_close(up.square().sum() + down.square().sum(), 2 * values.sum())


def test_it_acts_every_interval_and_at_no_other_step() -> None:
    training = Training(refactorisation(interval=3))
    for step in range(1, 8):
        training.run(1)
        up, down = training.pair.up.detach(), training.pair.down.detach()
        assert torch.allclose(up.T @ up, down @ down.T) == (step % 3 == 0)


def test_first_moments_become_those_of_the_gradients_in_the_new_coordinates() -> None:
    training = Training(refactorisation())
    training.run(4)
    unbalanced(training)
    pair, run = training.pair, training.started
    training.gradients()
    state = training.optimizer.state
    for factor in (pair.up, pair.down):
        state[factor]["exp_avg"] = factor.grad.clone()
    dynamics_of(training, "refactorisation")
    with torch.no_grad():
        refactorise(run, pair)
    training.gradients()
    for factor in (pair.up, pair.down):
        torch.testing.assert_close(state[factor]["exp_avg"], factor.grad)


def test_second_moments_of_uncorrelated_gradients_become_those_in_the_new_coordinates() -> None:
    training = Training(refactorisation())
    training.run(4)
    pair, moment = training.pair, training.optimizer.state[training.pair.up]
    down = pair.down.detach().clone()
    samples = normal(100_000, 2, seed=11) * torch.tensor([3.0, 0.5], dtype=torch.float64)
    moment["exp_avg_sq"] = samples.square().mean(0).expand(10, 2).clone()
    dynamics_of(training, "refactorisation")
    with torch.no_grad():
        refactorise(training.started, pair)
    new_rows = pair.down.detach() @ torch.linalg.pinv(down)  # N of A' = N A, and g_B' = g_B N^T
    moved = (samples @ new_rows.T).square().mean(0).expand(10, 2)
    torch.testing.assert_close(training.optimizer.state[pair.up]["exp_avg_sq"], moved, rtol=0.02, atol=0)


def test_a_product_of_lower_rank_than_its_factors_is_left_as_it_is() -> None:
    training = Training(refactorisation())
    dynamics_of(training, "refactorisation")
    down = training.pair.down.detach().clone()
    with torch.no_grad():
        refactorise(training.started, training.pair)  # B = 0
    assert torch.equal(training.pair.down, down)


def test_momentum_resets_have_an_interval_of_their_own() -> None:
    training = Training(refactorisation(interval=100, reset_interval=4))
    training.run(3)
    down = training.pair.down.detach().clone()
    training.run(1)
    assert not torch.allclose(down, training.pair.down)
    for factor in (training.pair.up, training.pair.down):
        state = training.optimizer.state[factor]
        assert not state["exp_avg"].any()
        assert int(state["step"]) == 0
    training.run(1)
    assert training.optimizer.state[training.pair.up]["exp_avg"].any()


def test_after_a_reset_the_learning_rate_climbs_again() -> None:
    training = Training(refactorisation(interval=100, reset_interval=4, warmup=2))
    training.run(4)
    before = training.pair.up.detach().clone()
    training.run(1)
    assert torch.equal(training.pair.up, before)
    training.run(1)
    assert not torch.equal(training.pair.up, before)
    assert training.optimizer.param_groups[0]["lr"] == 1e-2


def test_a_learning_rate_at_which_unbalanced_factors_diverge_trains_balanced_ones() -> None:
    def loss_after(balance: bool) -> float:
        training = Training(refactorisation(init="pissa", interval=100), make=torch.optim.SGD, lr=0.1)
        unbalanced(training)
        dynamics_of(training, "refactorisation")
        with torch.no_grad():
            for pair in training.started.pairs if balance else ():
                refactorise(training.started, pair)
        return training.run(40)

    first = Training(refactorisation(init="pissa")).gradients()
    assert loss_after(balance=True) < 0.95 * first
    assert not loss_after(balance=False) < first


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"reset_interval": 0}, {"warmup": -1}], ids=str)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"refactorisation: {next(iter(wrong))} must be"):
        Training(refactorisation(**wrong))


def test_gates_between_the_factors_are_refused() -> None:
    with pytest.raises(Incompatible, match="refactorisation needs the factors alone"):
        Training(rf.Recipe("lora", ranks="adalora", dynamics=("refactorisation",)))


@pytest.mark.parametrize("structure", ["lora", "dora"])
@pytest.mark.parametrize("options", [{}, {"reset_interval": 7, "warmup": 3}], ids=str)
def test_training_resumes_bit_for_bit(options: dict[str, Any], structure: str, tmp_path: Path) -> None:
    assert_resumes(refactorisation(structure, **options), tmp_path, make=torch.optim.AdamW)


def test_the_adapter_folds_and_is_taken_away() -> None:
    training = Training(refactorisation())
    training.run(7)
    assert_ends(training)


@pytest.mark.parametrize(
    "point", ["lora/refactorize", "low-rank/refactorize", "sltrain/dynamics=refactorize"]
)
def test_it_is_found_by_its_other_name_and_recorded_by_its_own(point: str) -> None:
    assert rf.find_method("refactorize") is rf.find_method("refactorisation")
    model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(12, 10)), point, rank=2)
    with rf.attach(model, torch.optim.AdamW(rf.param_groups(model, lr=1e-2))) as handle:
        assert list(handle.methods) == ["refactorisation"]


def test_a_product_trained_from_scratch_is_balanced() -> None:
    training = Training(refactorisation("low-rank", interval=3))
    training.run(2)
    unbalanced(training)
    training.run(1)
    up, down = training.pair.up.detach(), training.pair.down.detach()
    torch.testing.assert_close(up.T @ up, down @ down.T)
