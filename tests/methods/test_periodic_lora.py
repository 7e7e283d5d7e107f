"""PeriodicLoRA: stages of training, each unloaded into the weight."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import rank_of
from methods._moving import Training, assert_ends, assert_resumes, dynamics_of, event, recipe

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.optim import first_moments, second_moments


def periodic(structure: Any = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return recipe("periodic-lora", structure, init, **({"interval": 5} | options))


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("structure", ["lora", "dora"])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_the_end_of_a_stage_leaves_the_function_unchanged(momentum: float, structure: str, init: str) -> None:
    training = Training(periodic(structure, init, momentum=momentum))
    training.run(4)
    method, run = dynamics_of(training, "periodic-lora"), training.started
    base, product = training.pair.base.value.clone(), training.pair.change()
    run.state["clock"] = 5
    before, after = event(training, lambda: method.stepped(run))
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)
    torch.testing.assert_close(training.pair.base.value - base, (1 - momentum) * product)
    torch.testing.assert_close(training.pair.change(), momentum * product)


def test_a_full_stage_draws_the_factors_again_and_empties_the_optimizer() -> None:
    training = Training(periodic())
    down = training.pair.down.detach().clone()
    training.run(5)
    assert not training.pair.up.any()
    assert not torch.equal(training.pair.down, down)
    for factor in (training.pair.up, training.pair.down):
        state = training.optimizer.state[factor]
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
        assert int(state["step"]) == 0


def test_a_part_that_stays_keeps_its_input_factor_and_the_state_follows_the_output_factor() -> None:
    training = Training(periodic(momentum=0.4))
    training.run(4)
    method, run, pair = dynamics_of(training, "periodic-lora"), training.started, training.pair
    down = pair.down.detach().clone()
    kept = {
        p: (first_moments(training.optimizer, p), second_moments(training.optimizer, p))
        for p in (pair.up, pair.down)
    }
    kept = {p: [v.clone() for found in both for v in found.values()] for p, both in kept.items()}
    run.state["clock"] = 5
    with torch.no_grad():
        method.stepped(run)
    state_up, state_down = training.optimizer.state[pair.up], training.optimizer.state[pair.down]
    assert torch.equal(pair.down, down)
    assert int(state_down["step"]) == 4
    torch.testing.assert_close([state_up["exp_avg"], state_up["exp_avg_sq"]], kept[pair.up])
    torch.testing.assert_close(state_down["exp_avg"], 0.4 * kept[pair.down][0])
    torch.testing.assert_close(state_down["exp_avg_sq"], 0.4**2 * kept[pair.down][1], atol=0, rtol=1e-9)


def test_the_moments_that_follow_are_those_of_gradients_taken_at_the_smaller_factor() -> None:
    training = Training(periodic(momentum=0.4))
    training.run(4)
    training.gradients()
    pair = training.pair
    before = pair.up.grad.clone(), pair.down.grad.clone()
    method, run = dynamics_of(training, "periodic-lora"), training.started
    with torch.no_grad():
        method.unload(run, pair)
    training.gradients()
    torch.testing.assert_close(pair.up.grad, before[0])
    torch.testing.assert_close(pair.down.grad, 0.4 * before[1])


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_rank_of_the_change_grows_by_that_of_the_adapter_with_every_stage(stages: int) -> None:
    training = Training(periodic())
    training.run(5 * stages)
    assert rank_of(training.moved()) == min(2 * stages, 10)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_one_stage_is_lora(momentum: float) -> None:
    single, plain = Training(periodic(interval=100, momentum=momentum)), Training(rf.Recipe("lora"))
    single.run(12)
    plain.run(12)
    assert torch.equal(single.function(), plain.function())


def test_stages_without_momentum_are_relora_without_warm_up() -> None:
    stages = Training(periodic())
    restarts = Training(recipe("relora", interval=5, warmup=0, prune=1.0))
    stages.run(5)
    restarts.run(5)
    torch.testing.assert_close(stages.function(), restarts.function())


@pytest.mark.parametrize(("total", "share", "length"), [(40, 0.25, 10), (10, 0.3, 3), (2, 0.1, 1)])
def test_a_stage_lasts_its_share_of_the_training(total: int, share: float, length: int) -> None:
    training = Training(periodic(interval=None, share=share), total=total)
    for step in range(1, 3 * length + 1):
        training.run(1)
        assert bool(training.pair.up.any()) == (step % length != 0)


def test_a_share_needs_the_total_number_of_steps() -> None:
    model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), "lora/periodic-lora", rank=1, targets="0")
    optimizer = torch.optim.Adam(rf.param_groups(model, lr=1e-2))
    with pytest.raises(InvalidOption, match="periodic-lora needs total_steps: pass total_steps= to attach"):
        rf.attach(model, optimizer)


SCHEDULES = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: (step + 1) / 20),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 8),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.5, 1.0, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        [2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_begins_again_with_every_stage(name: str) -> None:
    training = Training(periodic(restart_schedule=True), scheduler=SCHEDULES[name])
    rates = []
    for _ in range(15):
        training.gradients()
        training.optimizer.step()
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.scheduler.step()
    assert rates[5:10] == pytest.approx(rates[:5])
    assert rates[10:15] == pytest.approx(rates[:5])
    assert len(set(rates[:5])) > 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_training_begins_the_schedule_again_where_it_first_began(name: str) -> None:
    first = Training(periodic(restart_schedule=True), scheduler=SCHEDULES[name])
    first.run(7)
    file = io.BytesIO()
    torch.save([first.optimizer.state_dict(), first.scheduler.state_dict()], file)
    file.seek(0)
    optimizer, schedule = torch.load(file, weights_only=True)
    second = Training(periodic(restart_schedule=True), scheduler=SCHEDULES[name])
    second.scheduler.load_state_dict(schedule)
    second.optimizer.load_state_dict(optimizer)
    for _ in range(6):
        first.run(1)
        second.run(1)
        rates = [t.optimizer.param_groups[0]["lr"] for t in (first, second)]
        assert rates[0] == rates[1]


def test_a_schedule_goes_on_unless_it_is_asked_for() -> None:
    training = Training(periodic(), scheduler=SCHEDULES["exponential"])
    training.run(7)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.8**7)


def test_a_schedule_that_is_to_begin_again_has_to_be_given() -> None:
    with pytest.raises(InvalidOption, match="periodic-lora needs scheduler: pass scheduler= to attach"):
        Training(periodic(restart_schedule=True))


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"share": 0.0}, {"momentum": 1.0}], ids=str)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="periodic-lora"):
        Training(periodic(**wrong))


def test_two_lengths_of_a_stage_are_refused() -> None:
    with pytest.raises(InvalidOption, match=r"interval = 5 and share = 0.5 both say how long a stage lasts"):
        Training(periodic(interval=5, share=0.5))


@pytest.mark.parametrize("structure", ["lora", "dora"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_training_resumes_bit_for_bit(momentum: float, structure: str, tmp_path: Path) -> None:
    point = periodic(structure, interval=None, share=0.2, momentum=momentum)
    assert_resumes(point, tmp_path, make=torch.optim.AdamW)


def test_what_was_unloaded_is_folded_and_taken_away() -> None:
    training = Training(periodic(momentum=0.5))
    training.run(11)
    assert_ends(training)
