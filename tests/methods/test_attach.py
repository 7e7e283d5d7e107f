"""Attaching: dynamics ride on any optimizer's steps, in any training loop, and survive being stopped."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._moving import INPUTS, WANTED, perceptron, recipe
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, NotAdapted
from rankfold.layers import NeverAttached
from rankfold.methods import registry
from rankfold.methods.attach import Attached, TotalStepsChanged
from rankfold.methods.rules import Dynamics
from rankfold.methods.run import MEMORY, Run

AdamW = torch.optim.AdamW
POINTS = {
    "lora+": recipe("lora+"),
    "relora": recipe("relora", interval=4, warmup=2),
    "lora-pro": recipe("lora-pro"),
    "loft": recipe("loft"),
    "allora": recipe("allora"),
    "adalora": rf.parse_point("lora/adalora"),
}


def adapted(point: Any = "lora/lora+") -> nn.Module:
    return rf.adapt(perceptron(), point, rank=2, targets="all-linear")


def optimizer_of(model: nn.Module, make: Any = AdamW, lr: float = 1e-2, **arguments: Any) -> Any:
    return make(rf.param_groups(model, lr=lr), **arguments)


def loss_of(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    loss: Tensor = (model(INPUTS[rows]) - WANTED[rows]).square().mean()
    return loss


def run(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(INPUTS)
    return result


def trained(point: Any, steps: int = 12) -> Tensor:
    """Return the output after a training in a bare loop."""
    model = adapted(point)
    optimizer = optimizer_of(model)
    rf.attach(model, optimizer, total_steps=40)
    run(model, optimizer, steps)
    return output(model)


def filed(optimizer: Any) -> Any:
    """Return the optimizer's state as it comes back from a file that may hold plain data only."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def begun(handle: Attached) -> Run:
    assert handle.run is not None
    return handle.run


# Loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_accumulated_gradients_are_the_gradients_of_the_whole_batch(point: Any) -> None:
    model = adapted(point)
    optimizer = optimizer_of(model)
    handle = rf.attach(model, optimizer, total_steps=40)
    for _ in range(12):
        optimizer.zero_grad()
        for start in range(0, 24, 6):
            (loss_of(model, slice(start, start + 6)) / 4).backward()
        optimizer.step()
    assert begun(handle).step == 12
    torch.testing.assert_close(output(model), trained(point), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_a_closure_trains_as_a_loop_does(point: Any, keyword: bool) -> None:
    model = adapted(point)
    optimizer = optimizer_of(model)
    handle = rf.attach(model, optimizer, total_steps=40)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(12):
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert torch.is_tensor(loss)
    assert begun(handle).step == 12
    assert torch.equal(output(model), trained(point))


def test_a_closure_of_sgd_is_evaluated_once_a_step() -> None:
    model, calls = adapted(), []
    optimizer = optimizer_of(model, torch.optim.SGD)
    handle = rf.attach(model, optimizer)

    def closure() -> Tensor:
        calls.append(1)
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) == begun(handle).step == 1


def test_an_optimizer_that_evaluates_its_closure_several_times_a_step_is_refused() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    model = adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(Incompatible, match="evaluates its closure once a step, and LBFGS does not"):
        rf.attach(model, torch.optim.LBFGS(parameters))
    optimizer = optimizer_of(model, Twice)
    rf.attach(model, optimizer)

    def closure() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    with pytest.raises(Incompatible, match="evaluates its closure once a step"):
        optimizer.step(closure)


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_a_step_that_a_gradient_scaler_skips_is_not_seen(point: Any) -> None:
    model = adapted(point)
    optimizer = optimizer_of(model)
    handle = rf.attach(model, optimizer, total_steps=40)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(14):
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * (float("inf") if step in (0, 7) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert begun(handle).step == 12
    torch.testing.assert_close(output(model), trained(point), rtol=1e-9, atol=1e-9)


def test_a_fused_step_of_a_gradient_scaler_is_refused() -> None:
    model = adapted()
    optimizer = optimizer_of(model, fused=True)
    rf.attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(Incompatible, match="create it with fused=False"):
        scaler.step(optimizer)


@pytest.fixture
def _plain_accelerate() -> Iterator[None]:
    """Forget the precision that another test has chosen for the whole process."""
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(True)
    yield
    state.AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_plain_accelerate")
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_the_wrapper_of_accelerate_trains_as_a_loop_does(point: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = adapted(point)
    inner = optimizer_of(model)
    model, optimizer = accelerator.prepare(model, inner)
    handle = rf.attach(model, optimizer, total_steps=40)
    assert begun(handle).optimizer is inner
    for _ in range(12):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model))
        optimizer.step()
    assert torch.equal(output(model), trained(point))


def test_attaching_before_accelerate_wraps_works_too() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = adapted()
    inner = optimizer_of(model)
    handle = rf.attach(model, inner)
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, inner)
    run(model, optimizer, 3)
    assert begun(handle).step == 3
    with pytest.raises(Incompatible, match="attached to this optimizer already"):
        rf.attach(model, optimizer)


# What is refused ----------------------------------------------------------------------------------------


def test_attaching_twice_is_refused_until_the_first_handle_is_removed() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    handle = rf.attach(model, optimizer)
    with pytest.raises(
        Incompatible, match=r"attached to this optimizer already; remove\(\) the first handle"
    ):
        rf.attach(model, optimizer)
    handle.remove()
    rf.attach(model, optimizer).remove()
    with rf.attach(model, optimizer):
        run(model, optimizer, 1)
    rf.attach(model, optimizer)


def test_an_optimizer_without_the_parameters_is_refused_by_the_name_of_one() -> None:
    model = adapted()
    groups = rf.param_groups(model, lr=1e-2)
    groups[0]["params"].pop()
    with pytest.raises(InvalidOption, match=r"does not hold .*2.*create it from rankfold\.param_groups"):
        rf.attach(model, AdamW(groups))
    other = adapted()
    with pytest.raises(InvalidOption, match="does not hold"):
        rf.attach(model, optimizer_of(other))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "many"])
def test_an_impossible_number_of_steps_is_refused(steps: Any) -> None:
    model = adapted()
    with pytest.raises(InvalidOption, match="total_steps must be a whole number of at least 1"):
        rf.attach(model, optimizer_of(model), total_steps=steps)


@pytest.mark.parametrize(
    ("point", "name"), [("lora/adalora", "adalora"), ("lora/dynamics=switchlora", "switchlora")]
)
def test_a_method_that_needs_the_total_steps_names_itself_and_them(point: str, name: str) -> None:
    model = adapted(point)
    with pytest.raises(InvalidOption, match=f"{name} needs total_steps: pass total_steps= to attach"):
        rf.attach(model, optimizer_of(model))


def test_what_is_no_scheduler_is_refused() -> None:
    model = adapted(recipe("periodic-lora", interval=2, restart_schedule=True))
    with pytest.raises(InvalidOption, match="scheduler must be one of PyTorch's or a wrapper of it, not 'x'"):
        rf.attach(model, optimizer_of(model), scheduler="x")


@pytest.mark.parametrize("loaded_after", [False, True])
def test_going_on_with_another_total_warns_once_by_the_methods_that_it_moves(loaded_after: bool) -> None:
    first = adapted("lora/adalora")
    optimizer = optimizer_of(first)
    rf.attach(first, optimizer, total_steps=20)
    run(first, optimizer, 2)
    second = adapted("lora/adalora")
    again = optimizer_of(second)
    if not loaded_after:
        again.load_state_dict(filed(optimizer))
    with warnings.catch_warnings(record=True) as caught:
        rf.attach(second, again, total_steps=40)
        if loaded_after:
            again.load_state_dict(filed(optimizer))
        run(second, again, 3)
    sentences = [str(found.message) for found in caught if found.category is TotalStepsChanged]
    assert sentences == [
        "the training was begun with total_steps=20 and goes on with 40: adalora follows the new total"
    ]


@pytest.mark.filterwarnings("error")
def test_going_on_with_the_same_total_or_where_none_is_read_does_not_warn() -> None:
    for point, totals in (("lora/adalora", (20, 20)), (recipe("relora", interval=4, warmup=2), (20, 40))):
        first, second = adapted(point), adapted(point)
        optimizer, again = optimizer_of(first), optimizer_of(second)
        rf.attach(first, optimizer, total_steps=totals[0])
        run(first, optimizer, 2)
        again.load_state_dict(filed(optimizer))
        rf.attach(second, again, total_steps=totals[1])
        run(second, again, 2)


def test_a_failed_attempt_leaves_the_optimizer_free() -> None:
    model = adapted("lora/adalora")
    optimizer = optimizer_of(model)
    with pytest.raises(InvalidOption):
        rf.attach(model, optimizer)
    rf.attach(model, optimizer, total_steps=10)


def test_gates_that_decay_are_refused() -> None:
    model = adapted("lora/adalora")
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(Incompatible, match="gates of a rank rule are in a parameter group with weight decay"):
        rf.attach(model, AdamW(parameters, weight_decay=0.1), total_steps=10)


def test_a_model_without_an_adapter_is_refused() -> None:
    model = perceptron()
    with pytest.raises(NotAdapted):
        rf.attach(model, torch.optim.SGD(model.parameters(), lr=1e-2))


@pytest.mark.parametrize("loaded_after", [False, True])
def test_the_state_of_another_point_is_refused(loaded_after: bool) -> None:
    first = adapted(recipe("relora"))
    optimizer = optimizer_of(first)
    rf.attach(first, optimizer)
    run(first, optimizer, 2)
    second = adapted(recipe("allora"))
    again = optimizer_of(second)
    sentence = "was left by .*relora.* and cannot be continued as .*allora"
    if loaded_after:
        rf.attach(second, again)
        again.load_state_dict(filed(optimizer))
        with pytest.raises(Incompatible, match=sentence):
            run(second, again, 1)
    else:
        again.load_state_dict(filed(optimizer))
        with pytest.raises(Incompatible, match=sentence):
            rf.attach(second, again)


# An empty handle, and the end of one ------------------------------------------------------------------------


def test_without_dynamics_the_handle_is_empty_and_says_so_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = adapted("lora")
    optimizer = optimizer_of(model)
    with caplog.at_level(logging.INFO, logger="rankfold"):
        handle = rf.attach(model, optimizer)
    assert [r.message for r in caplog.records] == [
        "nothing to attach: default has neither dynamics nor dynamic ranks"
    ]
    assert handle.methods == {}
    assert handle.run is None
    assert not optimizer._optimizer_step_pre_hooks
    rf.attach(model, optimizer).remove()
    run(model, optimizer, 1)
    assert MEMORY not in optimizer.param_groups[0]


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_removal_leaves_no_hook_and_what_follows_is_plain_training(point: Any) -> None:
    model = adapted(point)
    optimizer = optimizer_of(model)
    handle = rf.attach(model, optimizer, total_steps=40)
    run(model, optimizer, 5)
    handle.remove()
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    memory = copy.deepcopy(optimizer.param_groups[0][MEMORY])
    run(model, optimizer, 2)
    assert str(optimizer.param_groups[0][MEMORY]) == str(memory)


@pytest.mark.parametrize("name", ["lora-pro", "loft", "relora", "allora"])
def test_removing_and_attaching_again_goes_on_where_it_was(name: str) -> None:
    model = adapted(POINTS[name])
    optimizer = optimizer_of(model)
    for steps in (5, 7):
        with rf.attach(model, optimizer, total_steps=40):
            run(model, optimizer, steps)
    assert torch.equal(output(model), trained(POINTS[name]))


# Being stopped ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded_after", [False, True])
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_resuming_is_exact_whichever_comes_first_the_state_or_the_handle(
    point: Any, loaded_after: bool, tmp_path: Path
) -> None:
    model = adapted(point)
    optimizer = optimizer_of(model)
    rf.attach(model, optimizer, total_steps=40)
    run(model, optimizer, 7)
    rf.save(model, tmp_path / "half")
    state = filed(optimizer)
    run(model, optimizer, 9)
    again = rf.load(perceptron(), tmp_path / "half")
    other = optimizer_of(again)
    if not loaded_after:
        other.load_state_dict(state)
    handle = rf.attach(again, other, total_steps=40)
    if loaded_after:
        other.load_state_dict(state)
    assert begun(handle).step == 7
    run(again, other, 9)
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_a_model_and_its_optimizer_are_copied_and_pickled_with_a_handle_on_them(point: Any) -> None:
    model = adapted(point)
    optimizer = optimizer_of(model)
    rf.attach(model, optimizer, total_steps=40)
    run(model, optimizer, 5)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]  # noqa: S301
    run(model, optimizer, 7)
    for other, theirs in copies:
        rf.attach(other, theirs, total_steps=40)
        run(other, theirs, 7)
        assert torch.equal(output(other), output(model))


def test_plain_optimizer_state_can_be_trained_on_with_dynamics() -> None:
    model = adapted(recipe("allora"))
    plain = optimizer_of(model)
    run(model, plain, 3)
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(filed(plain))
    handle = rf.attach(model, optimizer)
    run(model, optimizer, 3)
    assert begun(handle).step == 3


# The protocol ------------------------------------------------------------------------------------------


@pytest.fixture
def watched(clean: None) -> list[tuple[str, int]]:
    """Register a dynamics that writes down its phases with the step, and return what it writes."""
    seen: list[tuple[str, int]] = []

    @registry.dynamics("watched", title="Watched", year=2026, formula="-")
    @dataclass(kw_only=True)
    class Watched(Dynamics):
        fail: bool = False

        def begin(self, run: Run) -> None:
            seen.append(("begin", run.step))

        def gradients_ready(self, run: Run) -> None:
            assert not torch.is_grad_enabled()
            seen.append(("gradients", run.step))
            run.scale_rates(0.5)
            run.scale_rates(0.5)
            if self.fail:
                raise RuntimeError("no")

        def stepped(self, run: Run) -> None:
            assert not torch.is_grad_enabled()
            seen.append(("stepped", run.step))

        def finish(self, run: Run) -> None:
            seen.append(("finish", run.step))

    return seen


def test_phases_come_in_their_order_and_begin_comes_once(watched: list[tuple[str, int]]) -> None:
    model = adapted("lora/watched")
    optimizer = optimizer_of(model)
    with rf.attach(model, optimizer):
        assert watched == []
        run(model, optimizer, 2)
    assert watched == [
        ("begin", 0), ("gradients", 0), ("stepped", 1), ("gradients", 1), ("stepped", 2), ("finish", 2),
    ]  # fmt: skip
    with rf.attach(model, optimizer):
        run(model, optimizer, 1)
    assert watched[6:] == [("gradients", 2), ("stepped", 3), ("finish", 3)]


def test_scaled_rates_hold_for_one_step_under_a_schedule(watched: list[tuple[str, int]]) -> None:
    model, plain = adapted("lora/watched"), adapted("lora")
    optimizer, other = optimizer_of(model, torch.optim.SGD), optimizer_of(plain, torch.optim.SGD, lr=2.5e-3)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (optimizer, other)]
    rf.attach(model, optimizer)
    for step in range(8):
        for each, theirs in ((model, optimizer), (plain, other)):
            run(each, theirs, 1)
        for schedule in schedules:
            schedule.step()
        wanted = schedules[1].get_last_lr()[0] * 4
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([wanted] * 2), step
    torch.testing.assert_close(output(model), output(plain))


def test_a_phase_that_fails_leaves_no_rate_changed(watched: list[tuple[str, int]]) -> None:
    model = adapted(rf.Recipe("lora", dynamics=(("watched", {"fail": True}),)))
    optimizer = optimizer_of(model, lr=1.0)
    rf.attach(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            run(model, optimizer, 1)
        assert {group["lr"] for group in optimizer.param_groups} == {1.0}


def test_every_group_of_the_optimizer_is_scaled_and_the_memory_lies_in_the_first(
    watched: list[tuple[str, int]],
) -> None:
    model = adapted("lora/watched")
    rest = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*rf.param_groups(model, lr=1.0), {"params": [rest], "lr": 1.0}])
    rf.attach(model, optimizer)
    rest.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(rest.detach(), torch.full((3,), 0.75))
    assert [MEMORY in group for group in optimizer.param_groups] == [True, False, False]


def test_what_is_remembered_is_apart_for_every_method_and_key_and_draws_depend_on_all_of_them() -> None:
    model = adapted()
    handle = rf.attach(model, optimizer_of(model))
    seen = begun(handle)
    draws = []
    for scope in ("one", "two"):
        seen.enter(scope)
        for key in ("a", "b"):
            seen.memory(key)["name"] = scope + key
            draws.append(float(torch.rand((), generator=seen.generator(key))))
    assert seen.memory("a", "one") == {"name": "onea"}
    assert seen.memory("b") == {"name": "twob"}
    seen.state["clock"] += 1
    draws.append(float(torch.rand((), generator=seen.generator("b"))))
    assert len(set(draws)) == 5


def test_two_adapters_with_dynamics_cannot_be_attached_together() -> None:
    model = rf.adapt(perceptron(), "lora/lora+", rank=2, targets=["0"], name="first")
    rf.adapt(model, "lora/allora", rank=2, targets=["2"], name="second")
    rf.use(model, ["first", "second"])
    with pytest.raises(Incompatible, match=r"\['first', 'second'\] all have dynamics; use one at a time"):
        rf.attach(model, optimizer_of(model))
    rf.use(model, "second")
    assert list(rf.attach(model, optimizer_of(model)).methods) == ["allora"]


def test_a_plain_adapter_beside_one_with_dynamics_trains_as_ever() -> None:
    model = rf.adapt(perceptron(), recipe("lora-pro"), rank=2, targets=["0"], name="first")
    rf.adapt(model, "lora", rank=2, targets=["2"], name="second")
    rf.use(model, ["first", "second"])
    optimizer = optimizer_of(model)
    handle = rf.attach(model, optimizer)
    assert [pair.path for pair in begun(handle).pairs] == ["0"]
    before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    run(model, optimizer, 3)
    assert all(not torch.equal(p, old) for p, old in before.items())
    assert len(optimizer.state) == 2


class Louder(torch.optim.AdamW):
    """An optimizer whose step calls its parent's, so that PyTorch runs step hooks twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_step_that_calls_its_parents_step_counts_once() -> None:
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # its class has been wrapped
    model = rf.adapt(nn.Sequential(nn.Linear(6, 6)), "lora/lora+", rank=2, targets=["0"])
    optimizer = Louder(rf.param_groups(model, lr=1e-2))
    with rf.attach(model, optimizer) as handle:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
        assert handle.run.step == 3


# Handles and adapters -----------------------------------------------------------------------------------


def two_adapters() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Return a model whose second adapter shrinks, its optimizer, and the handle."""
    model = rf.adapt(nn.Sequential(nn.Linear(6, 6)), "lora", rank=2, targets=["0"], name="plain")
    shrinking = rf.Recipe("lora", dynamics=(("shrink-perturb", {"interval": 1}),))
    rf.adapt(model, shrinking, rank=2, targets=["0"], name="shrinking")
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-2))
    return model, optimizer, rf.attach(model, optimizer)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()


def test_a_step_while_the_attached_adapter_is_out_of_use_is_refused() -> None:
    model, optimizer, handle = two_adapters()
    take_step(model, optimizer)
    rf.use(model, "plain")
    with pytest.raises(Incompatible, match=r"'shrinking', whose dynamics are attached .* is not in use"):
        take_step(model, optimizer)
    assert handle.run.step == 1
    rf.use(model, "shrinking")
    take_step(model, optimizer)


def test_squeezing_under_a_handle_and_a_second_optimizer_are_refused() -> None:
    model, _, handle = two_adapters()
    with pytest.raises(Incompatible, match=r"remove\(\) their handle before squeezing"):
        rf.squeeze(model, 1, name="shrinking")
    with pytest.raises(Incompatible, match="attached to another optimizer"):
        rf.attach(model, torch.optim.AdamW(rf.param_groups(model, lr=1e-2)))
    handle.remove()
    rf.squeeze(model, 1, name="shrinking")


def test_folding_under_a_handle_is_refused_and_works_after_it() -> None:
    model, optimizer, handle = two_adapters()
    take_step(model, optimizer)
    with pytest.raises(Incompatible, match=r"'shrinking' .*attached to an optimizer; remove\(\) the handle"):
        rf.fold(model)
    copied = rf.fold(copy.deepcopy(model))  # the handle acts on the model that it was made for
    handle.remove()
    rf.fold(model)
    assert torch.equal(model(torch.ones(2, 6)), copied(torch.ones(2, 6)))


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_a_handle_whose_adapter_was_removed_lets_go_without_acting(point: Any) -> None:
    model = adapted(point)
    optimizer = optimizer_of(model)
    handle = rf.attach(model, optimizer, total_steps=2)
    run(model, optimizer, 2)
    rf.remove(model)
    ranks = [pair.rank for pair in begun(handle).pairs]
    handle.remove()
    assert [pair.rank for pair in begun(handle).pairs] == ranks
    assert not optimizer._optimizer_step_pre_hooks


def test_a_handle_does_not_act_on_another_adapter_of_its_adapters_name() -> None:
    model, optimizer, handle = two_adapters()
    take_step(model, optimizer)
    rf.remove(model, "shrinking")
    rf.adapt(model, "lora", rank=2, targets=["0"], name="shrinking")
    with pytest.raises(Incompatible, match="is not in use"):
        take_step(model, optimizer)
    handle.remove()
    take_step(model, optimizer)


@pytest.mark.parametrize("optimizer", [None, "adam", torch.optim.AdamW])
def test_what_is_no_optimizer_is_refused(optimizer: Any) -> None:
    model, _, handle = two_adapters()
    handle.remove()
    with pytest.raises(InvalidOption, match="attach needs an optimizer of PyTorch"):
        rf.attach(model, optimizer)


def test_an_adapter_whose_dynamics_never_acted_warns_when_it_is_saved_or_folded(tmp_path: Path) -> None:
    model = rf.adapt(nn.Sequential(nn.Linear(6, 6)), "lora/relora", rank=2, targets=["0"])
    with pytest.warns(NeverAttached, match="have never been attached"):
        rf.save(model, tmp_path / "adapter")
    with pytest.warns(NeverAttached):
        rf.fold(model)


@pytest.mark.filterwarnings("error::rankfold.layers.NeverAttached")
def test_rates_by_side_do_not_have_to_be_attached(tmp_path: Path) -> None:
    model = rf.adapt(nn.Sequential(nn.Linear(6, 6)), "lora/lora+", rank=2, targets=["0"])
    rf.save(model, tmp_path / "adapter")
