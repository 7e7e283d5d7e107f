"""CoDyRA: sparse gates, one task after the other."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import Host
from methods._dynamic import (
    LAYERS,
    PATHS,
    Training,
    ends_the_same,
    ignores_skipped_steps,
    perceptron,
    resumes,
    runs_on,
)
from methods._layers import normal

import rankfold as rf
from rankfold.errors import InvalidOption, NotAdapted
from rankfold.methods.ranks.codyra import next_task
from rankfold.methods.ranks.sora import shrunk


def point(structure: str = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return rf.Recipe(structure, init, ("codyra", {"threshold": 0.1, **options}))


def test_the_start_is_the_base_at_scale_one_with_normal_gates() -> None:
    training = Training(point())
    assert torch.equal(training.output(), perceptron()(training.x))
    assert all(pair.scale == 1 for pair in training.pairs)
    assert all((gate != 0).all() and not (gate == 1).any() for gate in training.gates())
    assert all((gate == 1).all() for gate in Training(point(init="pissa")).gates())


def test_no_gate_is_zero_in_the_dense_phase_and_some_are_after_it() -> None:
    training = Training(point())
    training.step(20)
    assert training.open() == 6
    training.step(20)
    assert training.open() < 6


def test_kappa_climbs_from_zero_in_levels() -> None:
    training = Training(point(threshold=0.4, levels=5), 500)
    rule: Any = training.handle.methods["ranks=codyra"]
    found = []
    for step in range(1, 501):
        training.run.state["clock"] = step
        found.append(rule.kappa(training.run))
    assert found[:251] == [0.0] * 251
    assert found == sorted(found)
    assert sorted(set(found)) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert found[-1] == 0.4


def test_the_papers_shrinking_adds_up_to_about_half_of_a_gate() -> None:
    training = Training(rf.parse_point("lora/codyra"), 500)
    rule: Any = training.handle.methods["ranks=codyra"]
    total = 0.0
    for step in range(1, 501):
        training.run.state["clock"] = step
        total += rule.kappa(training.run)
    assert 0.55 < total < 0.65


def test_the_step_is_the_proximal_one() -> None:
    plain, sparse = Training(point(threshold=0.0)), Training(point())
    plain.step(24)
    sparse.step(23)
    rule: Any = sparse.handle.methods["ranks=codyra"]
    before = sparse.gates()
    with torch.no_grad():
        sparse.run.state["clock"] = 24
        rule.stepped(sparse.run)
    assert 0 < rule.kappa(sparse.run) < 0.1
    for own, other in zip(sparse.gates(), before, strict=True):
        torch.testing.assert_close(own, shrunk(other, rule.kappa(sparse.run)))


def test_the_next_task_starts_with_the_last_ones_function() -> None:
    training = Training(point())
    training.step(40)
    before = training.output()
    training.handle.remove()
    torch.testing.assert_close(training.output(), before)
    old = training.pairs[0].down.detach().clone()
    again = Training(next_task(training.model), 40)
    torch.testing.assert_close(again.output(), before, rtol=1e-12, atol=1e-12)
    assert again.ranks() == [2, 2, 2]
    assert all((gate != 0).all() for gate in again.gates())
    assert old.shape != again.pairs[0].down.shape or not torch.equal(old, again.pairs[0].down)
    first = again.step()
    assert again.step(39) < first


def test_after_the_last_merge_the_architecture_is_the_bases() -> None:
    training = Training(point())
    training.step(40)
    training.handle.remove()
    model = rf.fold(next_task(training.model))
    assert str(model) == str(perceptron())
    assert list(model.state_dict()) == list(perceptron().state_dict())


def test_the_next_task_keeps_targets_rank_name_and_modules_trained_whole() -> None:
    model = rf.adapt(perceptron(), point(), rank=3, targets=["0"], name="first", train=["4"], seed=5)
    with torch.no_grad():
        model[4].bias += 1  # type: ignore[index]
    output = model(normal(3, 8)).detach()
    next_task(model)
    adapter = model.__dict__["_rankfold"].adapter()
    assert (adapter.name, adapter.paths, adapter.record["rank"]) == ("first", ["0"], 3)
    assert (adapter.record["train"], adapter.record["seed"]) == (["4"], 6)
    torch.testing.assert_close(model(normal(3, 8)), output)
    assert next_task(model, seed=1).__dict__["_rankfold"].adapter().record["seed"] == 1


def test_there_is_no_next_task_without_an_adapter() -> None:
    with pytest.raises(NotAdapted):
        next_task(perceptron())


def test_three_tasks_in_turn_are_learned_and_forgotten_no_more_than_by_dense_merging() -> None:
    def forgetting(threshold: float) -> float:
        model, losses = perceptron(), []
        tasks = [(normal(32, 8, seed=s), 0.5 * normal(32, 4, seed=s + 9)) for s in range(3)]
        for i, (x, y) in enumerate(tasks):
            if i:
                next_task(model)
            else:
                rf.adapt(model, point(threshold=threshold), rank=4, targets=list(PATHS))
            training = Training(model, 60)
            training.x, training.y = x, y
            first, last = training.backward(), training.step(60)
            training.handle.remove()
            assert last < first
            losses.append(last)
        rf.fold(model)
        x, y = tasks[0]
        return float((model(x) - y).square().mean().detach()) - losses[0]

    assert forgetting(0.05) < forgetting(0.0)


def test_files_and_folding_have_the_ranks_that_are_left(tmp_path: Path) -> None:
    training = ends_the_same(point(threshold=0.2), tmp_path)
    assert sum(training.ranks()) < 6


def test_merging_is_exact() -> None:
    training = Training(point("lora", "pissa"))
    training.step(40)
    folded = rf.fold(copy.deepcopy(training.model))
    torch.testing.assert_close(folded(training.x), training.output(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("structure", "init"), [("lora", None), ("dora", "pissa"), ("hira", None), ("abba", None)]
)
def test_training_resumes_bit_for_bit(structure: str, init: str | None, tmp_path: Path) -> None:
    resumes(point(structure, init), tmp_path)


def test_skipped_steps_do_not_count() -> None:
    ignores_skipped_steps(point(dense=0.0))


@pytest.mark.parametrize("host", LAYERS, ids=lambda host: host.name)
def test_it_runs_on_every_kind_of_layer(host: Host) -> None:
    runs_on(point(threshold=0.01), host)


@pytest.mark.parametrize("options", [{"threshold": -1.0}, {"dense": 1.0}, {"levels": 1}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"codyra: {next(iter(options))} must be"):
        Training(point(**options))
