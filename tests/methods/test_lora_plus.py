"""LoRA+: the output side learns faster by a constant ratio."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods._moving import INPUTS, WANTED, Training, assert_resumes, perceptron, recipe
from torch import nn
from torch.optim import lr_scheduler

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.dynamics.lora_plus import LoraPlus

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 10),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
}


@pytest.mark.parametrize("ratio", [16.0, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_ratio_holds_at_every_step_of_any_schedule(schedule: str, ratio: float) -> None:
    training = Training(recipe("lora+", ratio=ratio), scheduler=SCHEDULES[schedule])
    groups = {group["name"]: group for group in training.optimizer.param_groups}
    for _ in range(12):
        assert groups["output"]["lr"] == pytest.approx(ratio * groups["input"]["lr"], rel=1e-14)
        training.run(1)


def test_with_a_power_of_two_the_ratio_is_exact_at_every_step() -> None:
    training = Training(recipe("lora+"), scheduler=SCHEDULES["cosine"])
    groups = {group["name"]: group for group in training.optimizer.param_groups}
    for _ in range(12):
        assert groups["output"]["lr"] / groups["input"]["lr"] == 16
        training.run(1) if groups["input"]["lr"] > 1e-3 else None


def test_the_first_step_of_sgd_moves_the_weight_by_the_ratio_times_the_gradient_seen_through_a() -> None:
    ratio, lr, scale = 8.0, 1e-2, 3.0
    model, base = perceptron(), perceptron()
    adapted = rf.adapt(
        model, recipe("lora+", ("lora", {"alpha": 6.0}), ratio=ratio), rank=2, targets="all-linear"
    )
    training = Training(adapted, make=torch.optim.SGD, lr=lr)
    down = training.pair.down.detach().clone()
    training.run(1)
    (base(INPUTS) - WANTED).square().mean().backward()
    wanted = -ratio * lr * scale**2 * base[0].weight.grad @ down.mT @ down
    torch.testing.assert_close(training.pair.change(), wanted)
    assert torch.equal(training.pair.down.detach(), down)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_with_a_ratio_of_one_it_is_lora_to_the_last_bit(make: Any) -> None:
    model = rf.adapt(perceptron(), "lora", rank=2, targets="all-linear")
    optimizer = make(rf.param_groups(model, lr=1e-2))
    for _ in range(12):
        optimizer.zero_grad()
        (model(INPUTS) - WANTED).square().mean().backward()
        optimizer.step()
    training = Training(recipe("lora+", ratio=1.0), make=make)
    training.run(12)
    assert torch.equal(training.function(), model(INPUTS).detach())


def test_in_vera_the_output_vector_is_the_fast_one() -> None:
    model = rf.adapt(perceptron(), "vera/lora+", rank=4, targets="all-linear")
    rates = {group["name"]: (group["lr"], group["params"]) for group in rf.param_groups(model, lr=1.0)}
    assert rates["output"][0] == 16
    assert rates["input"][0] == 1
    assert [p.shape for p in rates["output"][1]] == [(10,), (6,)]
    assert [p.shape for p in rates["input"][1]] == [(4,), (4,)]
    training = Training(model)
    assert training.run(1) > training.run(20)


def test_what_is_on_neither_side_keeps_the_base_rate() -> None:
    model = rf.adapt(perceptron(), "dora/lora+", rank=2, targets=["0"], train=["2"])
    assert {g["name"]: g["lr"] for g in rf.param_groups(model, lr=1.0)} == {
        "input": 1,
        "other": 1,
        "output": 16,
    }


@pytest.mark.parametrize(
    "make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop]
)
def test_a_plain_optimizer_is_refused(make: Any) -> None:
    model = rf.adapt(perceptron(), "lora/lora+", rank=2, targets="all-linear")
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(
        Incompatible, match=r"16 times as high on the output side; create the optimizer from rankfold"
    ):
        rf.attach(model, make(trained, lr=1e-3))


def test_one_layer_in_the_wrong_group_is_refused() -> None:
    model = rf.adapt(perceptron(), "lora/lora+", rank=2, targets="all-linear")
    groups = rf.param_groups(model, lr=1e-3)
    groups[0]["params"].append(groups[1]["params"].pop())
    with pytest.raises(Incompatible, match="16 times as high"):
        rf.attach(model, torch.optim.Adam(groups))


def test_a_schedule_that_starts_at_zero_is_accepted() -> None:
    assert Training(recipe("lora+"), scheduler=SCHEDULES["warm-up"]).handle.methods


def test_a_structure_that_trains_on_one_side_only_is_refused() -> None:
    with pytest.raises(Incompatible, match="tells output side from input side, and lora-xs trains on one"):
        rf.adapt(nn.Sequential(nn.Linear(8, 8)), "lora-xs/lora+", rank=2, targets="0")


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_a_ratio_that_is_not_positive_is_refused(ratio: float) -> None:
    with pytest.raises(InvalidOption, match="ratio must be positive"):
        LoraPlus(ratio=ratio)


@pytest.mark.parametrize("structure", ["lora", "dora", "vera"])
def test_training_resumes_bit_for_bit(structure: str, tmp_path: Any) -> None:
    assert_resumes(recipe("lora+", structure), tmp_path)
