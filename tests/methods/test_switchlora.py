"""SwitchLoRA: vectors of the factors exchanged for others, W absorbing the difference."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import adapted, linear, normal, rank_of
from methods._moving import Training, assert_ends, assert_resumes, dynamics_of, event, perceptron, recipe

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.dynamics.switchlora import SwitchLoRA, switch
from rankfold.methods.inits.switchlora import GAIN, candidates, deviations


def switching(structure: Any = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return recipe("switchlora", structure, init, **{"interval": 4.0, "ratio": 10.0, "freeze": 2, **options})


def never(**options: Any) -> rf.Recipe:
    return switching(interval=1e9, **options)


def started(point: rf.Recipe, steps: int = 3, **options: Any) -> tuple[Training, Any]:
    """Return a training a few steps old, and its method with its memory in reach."""
    training = Training(point, rank=4, **options)
    training.run(steps)
    return training, dynamics_of(training, "switchlora")


def force(training: Training, method: Any, side: str) -> int:
    """Switch the vector that is next in turn; return its position."""
    index = int(training.memory("switchlora")[side]["next"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        assert method.switch_next(training.started, training.pair, side, generator)
    return index


# The start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("shape", [(256, 256), (128, 512), (512, 128)])
def test_the_product_starts_as_large_as_a_linear_layer_for_any_scaling(
    shape: tuple[int, int], alpha: float
) -> None:
    model = adapted("lora/init=switchlora", linear(*shape), rank=32, alpha=alpha)
    leaves = {leaf.name: leaf.tensor().detach() for leaf in model[0].expression.leaves()}
    product = alpha / 32 * leaves["up"] @ leaves["down"]
    assert float(product.std()) == pytest.approx(GAIN / math.sqrt(shape[1]), rel=0.05)


def test_at_the_papers_scaling_the_deviations_are_the_papers() -> None:
    out, columns, rank = 48, 96, 8
    up, down = deviations((out, columns), rank, 1 / rank)
    assert up == pytest.approx((rank / math.sqrt(out * columns)) ** 0.25 * GAIN**0.5)
    assert down == pytest.approx((math.sqrt(out) * rank / columns**1.5) ** 0.25 * GAIN**0.5)


@pytest.mark.parametrize("structure", ["lora", "dora"])
def test_the_start_keeps_the_base_and_trains_both_factors(structure: str) -> None:
    training = Training(never(structure=structure), rank=4)
    torch.testing.assert_close(training.function(), perceptron()(training.inputs).detach())
    training.gradients()
    assert training.pair.up.grad.abs().max() > 1e-4
    assert training.pair.down.grad.abs().max() > 1e-4


def test_candidates_are_uniform_and_each_depends_on_its_own_number_only() -> None:
    many = candidates(0, "path", "up", range(40), 500, 0.3)
    assert float(many.std()) == pytest.approx(0.3, rel=0.02)
    assert float(many.abs().max()) <= 0.3 * math.sqrt(3)
    assert torch.equal(candidates(0, "path", "up", [7], 500, 0.3)[0], many[7])
    assert not torch.equal(candidates(0, "path", "down", [7], 500, 0.3)[0], many[7])


# A switch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [None, "kaiming", "pissa"])
@pytest.mark.parametrize("structure", ["lora", "dora", ("lora", {"alpha": 12.0})])
@pytest.mark.parametrize("side", ["up", "down"])
def test_a_switch_leaves_the_function_unchanged(side: str, structure: Any, init: str | None) -> None:
    training, _ = started(never(structure=structure, init=init))
    incoming = normal(10 if side == "up" else 12, seed=9)
    factor = training.pair.up.T if side == "up" else training.pair.down
    outgoing = factor[1].detach().clone()
    found = []
    before, after = event(training, lambda: found.append(switch(training.pair, side, 1, incoming)))
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)
    assert torch.equal(factor[1], incoming)
    assert torch.equal(found[0], outgoing)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("side", ["up", "down"])
def test_the_partner_does_not_move_for_n_steps_and_then_does_and_the_others_always_do(
    side: str, make: Any
) -> None:
    def decaying(groups: Any) -> Any:
        for group in groups:
            group["weight_decay"] = 0.1
        return make(groups)

    training, method = started(never(freeze=3), make=decaying)
    training.gradients()
    index = force(training, method, side)
    partner = training.pair.down if side == "up" else training.pair.up.T
    for step in range(5):
        before = partner.detach().clone()
        if step:
            training.gradients()
        training.optimizer.step()
        moved = (partner != before).any(1)
        assert bool(moved[index]) == (step >= 3)
        assert bool(moved[torch.arange(4) != index].all())


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("side", ["up", "down"])
def test_a_vector_that_begins_again_takes_the_steps_of_an_optimizer_that_began_with_it(
    side: str, make: Any, amsgrad: bool
) -> None:
    def exact(groups: Any) -> Any:
        for group in groups:
            group["weight_decay"] = 0.1
        return make(groups, amsgrad=amsgrad, betas=(0.8, 0.95), eps=1e-3)

    training, method = started(never(freeze=2), steps=6, make=exact)
    training.gradients()
    index = force(training, method, side)
    partner = training.pair.down if side == "up" else training.pair.up.T
    training.optimizer.step()
    training.run(1)
    alone = torch.nn.Parameter(partner[index].detach().clone())
    other = exact([{"params": [alone], "lr": 1e-2}])
    for _ in range(6):
        training.gradients()
        gradient = training.pair.down.grad if side == "up" else training.pair.up.grad.T
        alone.grad = gradient[index].clone()
        training.optimizer.step()
        other.step()
        torch.testing.assert_close(partner[index], alone, atol=1e-12, rtol=1e-10)


def test_vectors_that_were_never_switched_take_plain_steps() -> None:
    idle, plain = Training(never(), rank=4), Training(rf.Recipe("lora", "switchlora"), rank=4)
    idle.run(8)
    plain.run(8)
    assert torch.equal(idle.function(), plain.function())


def test_the_moments_of_the_partner_are_zero_and_those_of_the_others_stay() -> None:
    training, method = started(never())
    training.gradients()
    state = training.optimizer.state[training.pair.up]
    before = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    index = force(training, method, "down")
    others = torch.arange(4) != index
    for key, value in before.items():
        assert not state[key][:, index].any()
        assert torch.equal(state[key][:, others], value[:, others])
    assert not training.pair.up.grad[:, index].any()


# When, and which --------------------------------------------------------------------------------------


def test_switches_per_step_are_as_frequent_as_the_schedule_says() -> None:
    training = Training(never(), rank=4, total=100)
    method = SwitchLoRA(interval=40.0, ratio=0.1)
    for step, share in ((0, 0.3**0.1), (9, 0.3), (19, 0.09)):
        training.started.state["clock"] = step
        generator = torch.Generator().manual_seed(0)
        drawn = [method.count(training.started, 100, generator) for _ in range(4000)]
        expected = 100 * share / 40
        assert set(drawn) == {math.floor(expected), math.floor(expected) + 1}
        assert sum(drawn) / 4000 == pytest.approx(expected, abs=0.03)


def test_rows_are_taken_in_turn_from_the_first_and_columns_from_the_middle() -> None:
    training, method = started(never(freeze=1))
    for expected in (0, 1, 2, 3, 0):
        assert force(training, method, "down") == expected
        training.gradients()
        training.optimizer.step()
        dynamics_of(training, "switchlora")
        assert force(training, method, "up") == (expected + 2) % 4
        training.gradients()
        training.optimizer.step()
        dynamics_of(training, "switchlora")


def test_a_position_that_is_frozen_on_either_side_is_not_switched() -> None:
    training, method = started(never(freeze=5))
    force(training, method, "down")
    memory = training.memory("switchlora")
    memory["up"]["next"] = memory["down"]["next"] = 0
    generator = torch.Generator().manual_seed(0)
    for side in ("up", "down"):
        assert not method.switch_next(training.started, training.pair, side, generator)


def test_no_candidate_is_in_two_places() -> None:
    training = Training(switching(interval=1.0, freeze=1), rank=4)
    seen = set()
    for _ in range(30):
        training.run(1)
        for side in ("up", "down"):
            installed = training.memory("switchlora")[side]["installed"].tolist()
            assert len(set(installed)) == 4
            assert all(0 <= number < 10 for number in installed)
            seen |= set(installed)
    assert len(seen) == 10


def test_a_start_that_is_from_no_pool_is_switched_for_candidates() -> None:
    training, method = started(never(init="kaiming"))
    memory = training.memory("switchlora")["down"]
    assert memory["installed"].tolist() == [-1] * 4
    force(training, method, "down")
    assert (memory["installed"] >= 0).tolist() == [True, False, False, False]


def test_a_weight_of_full_rank_has_no_candidate_to_spare() -> None:
    training = Training(switching(interval=1.0), rank=6)
    training.run(3)
    pairs, run = training.started.pairs, training.started
    run.enter("switchlora")
    assert run.memory(pairs[1].key)["down"]["installed"].tolist() == list(range(6))  # 6 x 10
    assert run.memory(pairs[0].key)["down"]["installed"].tolist() != list(range(6))  # 10 x 12


def test_with_exchange_the_vector_that_went_can_come_back_as_it_was() -> None:
    training, method = started(never(exchange=True))
    outgoing = training.pair.down[0].detach().clone()
    force(training, method, "down")
    pool = training.memory("switchlora")["down"]["pool"]
    assert list(pool) == ["0"]
    assert torch.equal(pool["0"], outgoing)
    memory = training.memory("switchlora")["down"]
    memory["next"], memory["installed"][1:] = 1, torch.tensor([7, 8, 9])
    taken = {int(n) for n in memory["installed"]}
    memory["installed"][2] = next(n for n in range(1, 7) if n not in taken)
    with torch.no_grad():
        for number in range(1, 10):  # leave candidate 0 as the only free one
            if number not in memory["installed"].tolist():
                memory["installed"] = torch.cat([memory["installed"], torch.tensor([number])])
    force(training, method, "down")
    assert torch.equal(training.pair.down[1], outgoing)


def test_without_exchange_nothing_of_the_pools_is_stored() -> None:
    training = Training(switching(interval=1.0, freeze=1), rank=4)
    training.run(10)
    assert all(not training.memory("switchlora")[side]["pool"] for side in ("up", "down"))


def test_the_change_gains_rank() -> None:
    training = Training(switching(interval=2.0, freeze=1), rank=2)
    training.run(40)
    assert rank_of(training.moved()) > 4  # of B A - B0 A0 alone


# Training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["lora", "dora"])
@pytest.mark.parametrize(
    ("init", "exchange", "make"),
    [(None, False, torch.optim.AdamW), ("kaiming", True, torch.optim.Adam), (None, True, torch.optim.SGD)],
)
def test_training_resumes_bit_for_bit(
    init: str | None, exchange: bool, make: Any, structure: str, tmp_path: Path
) -> None:
    point = switching(structure, init, interval=2.0, exchange=exchange)
    assert_resumes(point, tmp_path, make=make, rank=4)


def test_training_lowers_the_loss_and_what_was_moved_is_folded_and_taken_away() -> None:
    training = Training(switching(), rank=4)
    first = training.run(1)
    assert training.run(39) < 0.8 * first
    assert_ends(training)


def test_it_needs_the_number_of_steps_and_factors_without_gates() -> None:
    model = adapted("lora/dynamics=switchlora", rank=2)
    optimizer = torch.optim.Adam(rf.param_groups(model, lr=1e-2))
    with pytest.raises(InvalidOption, match="switchlora needs total_steps: pass total_steps= to attach"):
        rf.attach(model, optimizer)
    with pytest.raises(Incompatible, match="switchlora needs the factors alone, and adalora puts a gate"):
        adapted(rf.Recipe("lora", "kaiming", ranks="adalora", dynamics=("switchlora",)), rank=2)
    with pytest.raises(Incompatible, match="undo each other's effect"):
        adapted("lora/dynamics=switchlora/relora", rank=2)


@pytest.mark.parametrize("wrong", [{"interval": 0.0}, {"ratio": 0.0}, {"freeze": 0}], ids=str)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"switchlora: {next(iter(wrong))} must be"):
        adapted(switching(**wrong), rank=2)
