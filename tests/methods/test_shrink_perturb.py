"""Shrink and perturb: towards zero, and a little aside."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import adapted, change, disturbed, leaves_of, linear, normal
from methods._moving import Training, assert_resumes, recipe
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, NotAdapted
from rankfold.methods.dynamics.shrink_perturb import shrink_and_perturb


@pytest.mark.parametrize("shrink", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("structure", ["lora", "hira"])
def test_without_noise_the_change_is_multiplied_by_lambda_and_not_by_its_square(
    structure: str, shrink: float
) -> None:
    model = disturbed(adapted(structure, rank=3))
    before, down = change(model), leaves_of(model)["down"].clone()
    shrink_and_perturb(model, shrink, noise=0.0)
    torch.testing.assert_close(change(model), shrink * before)
    assert torch.equal(leaves_of(model)["down"], down)


def test_of_a_residual_start_the_product_shrinks_and_its_start_does_not() -> None:
    model = disturbed(adapted("lora/pissa", rank=3))
    leaves = {k: v.clone() for k, v in leaves_of(model).items()}
    shrink_and_perturb(model, 0.5, noise=0.0)
    expected = 0.5 * leaves["up"] @ leaves["down"] - leaves["up.start"] @ leaves["down.start"]
    torch.testing.assert_close(change(model), expected)


def test_the_noise_has_the_asked_size_and_comes_from_the_seed() -> None:
    model = adapted("lora", linear(200, 300), rank=8)
    before = {k: v.clone() for k, v in leaves_of(model).items()}
    other, again = copy.deepcopy(model), copy.deepcopy(model)
    shrink_and_perturb(model, 1.0, noise=0.02)
    shrink_and_perturb(other, 1.0, noise=0.02)
    shrink_and_perturb(again, 1.0, noise=0.02, seed=1)
    for name in ("up", "down"):
        noise = (leaves_of(model)[name] - before[name]).detach()
        assert float(noise.std()) == pytest.approx(0.02, rel=0.05)
        assert torch.equal(leaves_of(other)[name], leaves_of(model)[name])
        assert not torch.equal(leaves_of(again)[name], leaves_of(model)[name])


def test_the_whole_weight_shrinks_in_its_copy() -> None:
    model = disturbed(adapted(recipe("shrink-perturb-all", init="pissa", interval=5), rank=3))
    weight, stored = model[0].expression.dense().detach(), model[0].weight.detach().clone()
    shrink_and_perturb(model, 0.4, noise=0.0, whole=True)
    torch.testing.assert_close(model[0].expression.dense().detach(), 0.4 * weight)
    assert torch.equal(model[0].weight, stored)


def test_a_normalised_weight_shrinks_by_its_lengths() -> None:
    model = disturbed(adapted(recipe("shrink-perturb-all", "dora", interval=5), rank=3))
    weight, up = model[0].expression.dense().detach(), leaves_of(model)["up"].clone()
    shrink_and_perturb(model, 0.4, noise=0.0, whole=True)
    torch.testing.assert_close(model[0].expression.dense().detach(), 0.4 * weight)
    assert torch.equal(leaves_of(model)["up"], up)


def test_a_homogeneous_networks_outputs_shrink_by_a_power_of_lambda_and_its_classes_stay() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU()]
        base = nn.Sequential(*layers, nn.Linear(8, 4, bias=False)).double()
    model = rf.adapt(base, recipe("shrink-perturb-all", interval=5), rank=2, targets="all-linear")
    disturbed(model, 0.1)
    before = model(normal(16, 8)).detach()
    shrink_and_perturb(model, 0.5, noise=0.0, whole=True)
    after = model(normal(16, 8)).detach()
    torch.testing.assert_close(after, 0.5**3 * before)
    assert torch.equal(after.argmax(1), before.argmax(1))


def test_it_happens_every_interval_and_at_the_steps_that_are_listed() -> None:
    point = recipe("shrink-perturb", interval=4, at=[3, 6], shrink=0.0, noise=0.0)
    training = Training(point)
    for step in range(1, 9):
        training.run(1)
        assert bool(training.pair.up.any()) == (step not in (3, 4, 6, 8))


def test_the_state_of_the_factors_starts_again() -> None:
    training = Training(recipe("shrink-perturb", interval=4))
    training.run(3)
    assert training.optimizer.state[training.pair.up]["exp_avg"].any()
    training.run(1)
    for factor in (training.pair.up, training.pair.down):
        state = training.optimizer.state[factor]
        assert not state["exp_avg"].any()
        assert int(state["step"]) == 0


def test_the_function_resets_an_optimizer_too() -> None:
    training = Training(rf.Recipe("lora", dynamics=("lora+",)))
    training.run(3)
    shrink_and_perturb(training.model, optimizer=training.optimizer)
    assert not training.optimizer.state[training.pair.up]["exp_avg"].any()


@pytest.mark.parametrize("structure", ["lora", "dora"])
@pytest.mark.parametrize("name", ["shrink-perturb", "shrink-perturb-all"])
def test_training_resumes_bit_for_bit(name: str, structure: str, tmp_path: Path) -> None:
    point = recipe(name, structure, interval=7, at=[20], shrink=0.9)
    assert_resumes(point, tmp_path, make=torch.optim.AdamW)


def test_what_cannot_be_shrunk_is_named() -> None:
    with pytest.raises(Incompatible, match="0 holds no copy of its weight that could shrink"):
        shrink_and_perturb(adapted("lora", rank=2), whole=True)
    with pytest.raises(Incompatible, match="0 has no one trained product of two factors"):
        shrink_and_perturb(adapted("vera", rank=2))
    with pytest.raises(Incompatible, match="0 has no one trained product of two factors"):
        shrink_and_perturb(adapted("abba", rank=2))  # each of the two shrunk would give lambda^2
    with pytest.raises(NotAdapted):
        shrink_and_perturb(linear())


@pytest.mark.parametrize("wrong", [{"shrink": 1.5}, {"noise": -1.0}, {"interval": 0}, {"at": [0]}], ids=str)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="shrink"):
        adapted(recipe("shrink-perturb", **{"interval": 5, **wrong}), rank=2)


def test_a_moment_has_to_be_given() -> None:
    with pytest.raises(InvalidOption, match="shrink-perturb has no moment to act: give interval or at"):
        adapted("lora/shrink-perturb", rank=2)
