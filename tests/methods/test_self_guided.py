"""Self-guided training: the guide's start, its share, and its end."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import convolution, leaves_of, normal
from methods._moving import INPUTS, Training, assert_resumes, perceptron

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.weights import Guided

STRUCTURES = (("low-rank", {}), ("block-dense", {}), ("block-shuffle", {}))
each = pytest.mark.parametrize("structure", STRUCTURES, ids=[name for name, _ in STRUCTURES])


def point(structure: Any = "low-rank", **options: Any) -> rf.Recipe:
    return rf.Recipe(structure, dynamics=(("self-guided", options),))


def training(structure: Any = "low-rank", total: int = 40, **options: Any) -> Training:
    name = structure if isinstance(structure, str) else structure[0]
    return Training(point(structure, **options), rank=None if name == "block-shuffle" else 2, total=total)


def guided(model: torch.nn.Module) -> Guided:
    expression = model[0].expression  # type: ignore[index]
    assert isinstance(expression, Guided)
    return expression


@each
def test_the_guide_is_the_structured_map_itself_at_the_start(structure: Any) -> None:
    run = training(structure)
    weight = guided(run.model)
    torch.testing.assert_close(weight.guide.value, weight.now.dense())
    alone = rf.adapt(perceptron(), rf.Recipe(structure), rank=None if structure[0] == "block-shuffle" else 2)
    torch.testing.assert_close(run.function(), alone(INPUTS).detach())


@each
def test_at_the_start_the_output_is_the_guides_and_the_structured_map_has_no_gradient(structure: Any) -> None:
    run = training(structure)
    run.gradients()
    weight = guided(run.model)
    torch.testing.assert_close(weight(INPUTS), INPUTS @ weight.guide.value.T)
    assert weight.guide.value.grad.any()
    for parameter in weight.now.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_the_share_falls_along_a_cosine_over_half_of_the_steps() -> None:
    run = training(total=40)
    for step in range(20):
        expected = 0.5 * (1 + math.cos(math.pi * step / 20))
        assert guided(run.model).share.value[0].item() == pytest.approx(expected)
        guide, inner = guided(run.model).guide.value, guided(run.model).now.dense()
        torch.testing.assert_close(guided(run.model).dense(), expected * guide + (1 - expected) * inner)
        run.run(1)
    assert guided(run.model).guide is None


@each
def test_after_it_function_parameters_and_state_are_those_of_the_structured_map(structure: Any) -> None:
    run = training(structure)
    guides = [guided(run.model).guide.value, run.model[2].expression.guide.value]
    run.run(19)
    assert all(guide in run.optimizer.state for guide in guides)
    run.run(1)
    alone = rf.adapt(perceptron(), rf.Recipe(structure), rank=None if structure[0] == "block-shuffle" else 2)
    assert list(leaves_of(run.model)) == list(leaves_of(alone))
    assert rf.count(run.model) == rf.count(alone)
    torch.testing.assert_close(guided(run.model)(INPUTS), INPUTS @ guided(run.model).now.dense().T)
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert not any(p is guide for p in held for guide in guides)
    assert not any(guide in run.optimizer.state for guide in guides)
    assert {id(p) for p in held} == {id(p) for p in run.model.parameters()}
    before = run.function()
    run.run(1)
    assert not torch.equal(run.function(), before)


def test_the_cheap_version_leaves_the_guide_out_more_and_more_often() -> None:
    run, skipped = training(total=400, stochastic=True), []
    for _ in range(199):
        weight = guided(run.model)
        skipped.append(weight.skips)
        run.gradients()
        assert (weight.guide.value.grad is None) == weight.skips
        if weight.skips:
            x = normal(3, 12)
            torch.testing.assert_close(weight(x), weight.now(x))
        run.optimizer.step()
    assert not skipped[0]
    alphas = [0.5 * (1 + math.cos(math.pi * t / 200)) for t in range(199)]
    for part in (slice(0, 66), slice(66, 132), slice(132, 199)):
        expected = sum(1 - alpha for alpha in alphas[part])
        assert abs(sum(skipped[part]) - expected) < 3 * math.sqrt(66 / 4)
    assert run.model[2].expression.skips == guided(run.model).skips


def test_all_weights_are_left_out_of_the_same_steps() -> None:
    run = training(total=100, stochastic=True)
    for _ in range(30):
        run.run(1)
        assert guided(run.model).skips == run.model[2].expression.skips


@pytest.mark.parametrize("stop", [17, 20, 25])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_training_that_was_interrupted_is_the_one_that_was_not(
    tmp_path: Path, stop: int, stochastic: bool
) -> None:
    share = 1.0 if stochastic else 0.5  # draws are still open after the stop
    assert_resumes(point(stochastic=stochastic, share=share), tmp_path, stop=stop)


def test_a_model_without_any_other_group_resumes_after_the_guide_is_gone(tmp_path: Path) -> None:
    bare = torch.nn.Sequential(torch.nn.Linear(12, 6, bias=False)).double()
    run = Training(point("low-rank"), model=bare)
    run.run(25)
    rf.save(run.model, tmp_path / "model")
    loaded = rf.load(torch.nn.Sequential(torch.nn.Linear(12, 6, bias=False)).double(), tmp_path / "model")
    continued = Training(loaded, state=copy.deepcopy(run.optimizer.state_dict()))
    assert run.run(15) == continued.run(15)


def test_a_convolution_is_guided_by_a_convolution() -> None:
    model, x = rf.adapt(convolution(), point(), rank=2, targets=["0"]), normal(2, 4, 7, 6)
    alone = rf.adapt(convolution(), "low-rank", rank=2, targets=["0"])
    torch.testing.assert_close(model(x), alone(x))
    with torch.no_grad():
        guided(model).steer(0.3)
        guided(model).guide.value.mul_(2)
    torch.testing.assert_close(model(x) - alone(x), 0.3 * (alone(x) - alone[0].bias[:, None, None]))


def test_folding_before_its_end_gives_the_mixture() -> None:
    run = training()
    run.run(7)
    run.handle.remove()
    wanted = run.function()
    torch.testing.assert_close(rf.fold(run.model)(INPUTS).detach(), wanted)


def test_it_is_refused_where_it_has_no_meaning() -> None:
    for text, match in (
        ("lora/self-guided", "lora changes one that is there"),
        ("trp/self-guided", "trp has a training of its own"),
        ("low-rank/self-guided/lora-pro", "they are none"),
    ):
        with pytest.raises(Incompatible, match=match):
            rf.adapt(perceptron(), text)
    with pytest.raises(InvalidOption, match="share"):
        training(share=0.0)
