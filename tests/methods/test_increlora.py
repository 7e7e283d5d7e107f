"""IncreLoRA: ranks grow where they matter, by terms trained in advance."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import Host
from methods._dynamic import LAYERS, Training, ends_the_same, moments, perceptron, planted

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.events import change_terms
from rankfold.methods.importance import ChangeSensitivity, weight_gradient
from rankfold.methods.ranks.increlora import RESERVE_GATE
from rankfold.weights import Weight


def point(structure: str = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return rf.Recipe(structure, init, ("increlora", {"growth": 1, "top": 1, **options}))


def active(training: Training) -> list[int]:
    return [training.run.memory(pair.key)["active"] for pair in training.pairs]


def test_the_start_is_the_base_at_rank_one() -> None:
    training = Training(point())
    assert training.ranks() == [1, 1, 1]
    assert torch.equal(training.output(), perceptron()(training.x))


def test_reserves_enter_with_the_first_step_and_change_next_to_nothing() -> None:
    training = Training(point())
    before = training.output()
    training.step()
    gates = training.gates()
    assert [len(gate) for gate in gates] == [2, 2, 2]
    assert all(gate[1] == RESERVE_GATE for gate in gates)
    for pair in training.pairs:
        assert pair.gate is not None
        reserve = pair.scale * pair.gate[1] * torch.outer(pair.up[:, 1], pair.down[1])
        assert 0 < reserve.norm() < 1e-6 * before.norm()


def test_entering_the_reserves_loses_no_gradient() -> None:
    training, rule = Training(point(orthogonality=0.0)), "ranks=increlora"
    training.backward()
    gate = training.pairs[0].gate
    assert gate is not None
    assert gate.grad is not None
    slope = gate.grad.clone()
    training.optimizer.step()
    torch.testing.assert_close(training.optimizer.state[gate]["exp_avg"][:1], 0.1 * slope)
    assert training.run.state["memory"][rule]


def test_reserves_are_trained_in_advance_behind_gates_that_stay() -> None:
    training = Training(point(warmup=0.5, final=0.2))
    training.step()
    start = [pair.up[:, 1].detach().clone() for pair in training.pairs]
    training.step(19)
    for pair, old in zip(training.pairs, start, strict=True):
        assert pair.gate is not None
        assert pair.gate[1] == RESERVE_GATE
        assert not moments(training, pair.gate)[1].any()
        assert (pair.up[:, 1] - old).norm() > 0.1 * old.norm()


@pytest.mark.parametrize(
    "options", [{}, {"growth": 2}, {"growth": 3, "top": 2}, {"interval": 1}, {"interval": 1000}]
)
def test_the_total_rank_never_falls_and_ends_exactly_at_the_target(options: dict[str, Any]) -> None:
    training, totals = Training(point(**options), 30, rank=3), []
    for _ in range(30):
        training.step()
        totals.append(sum(active(training)))
    assert totals == sorted(totals)
    assert (totals[0], totals[-1]) == (3, 9)
    assert sum(training.ranks()) == 9  # no reserve is left
    assert all((gate != RESERVE_GATE).all() for gate in training.gates())


def test_growth_changes_no_output_whatever_alpha_is() -> None:
    training = Training(point(), 40, alpha=8.0)
    scales = [pair.scale for pair in training.pairs]
    assert scales == [4.0, 4.0, 4.0]  # alpha over the asked rank, not over the first one
    training.step(4)
    rule: Any = training.handle.methods["ranks=increlora"]
    before = training.output()
    with torch.no_grad():
        rule.activate(training.run, training.pairs[1], 1)
    assert active(training) == [1, 2, 1]
    assert (training.output() - before).abs().max() < 1e-7
    assert [pair.scale for pair in training.pairs] == scales


def test_fresh_terms_have_fresh_moments_and_the_others_keep_theirs() -> None:
    training = Training(point(), 40)
    training.step(4)
    pair = training.pairs[1]
    assert pair.gate is not None
    old = {
        name: moments(training, value)
        for name, value in (("up", pair.up), ("down", pair.down), ("gate", pair.gate))
    }
    fresh = torch.ones(pair.up.shape[0], 2).double(), torch.ones(2, pair.down.shape[1]).double()
    with torch.no_grad():
        change_terms(training.run, pair, torch.tensor([1, 0]), *fresh, torch.zeros(2).double())
    assert torch.equal(moments(training, pair.up)[:, :2], old["up"][:, [1, 0]])
    assert torch.equal(moments(training, pair.down)[:2], old["down"][[1, 0]])
    assert torch.equal(moments(training, pair.gate)[:2], old["gate"][[1, 0]])
    assert not moments(training, pair.up)[:, 2:].any()
    assert not moments(training, pair.down)[2:].any()
    training.step()


def test_a_weight_may_grow_beyond_one_and_a_half_times_the_asked_rank() -> None:
    training = planted(point(), steps=300)
    assert sum(training.ranks()) == 6
    assert training.ranks()[1] == max(training.ranks())
    assert training.ranks()[1] > 3


def test_no_weight_grows_beyond_its_smaller_side() -> None:
    training = Training(point(), 30, rank=4)
    rule: Any = training.handle.methods["ranks=increlora"]
    with torch.no_grad():
        rule.begin(training.run)
        while rule.missing(training.run) and rule.grow(training.run, 3):
            pass
    assert sum(active(training)) == 12
    assert all(
        n <= min(pair.expression.shape) for n, pair in zip(active(training), training.pairs, strict=True)
    )


def test_the_score_sees_the_sum_of_the_change_times_its_gradient() -> None:
    training = Training(point("dora"), 40)
    training.step(6)
    watch = ChangeSensitivity(training.run)
    leaf = training.model.get_submodule("2")
    with torch.no_grad():
        change = leaf.expression.dense() - leaf.matrix()  # type: ignore[union-attr, operator]
    hidden = training.model[:2](training.x).detach()  # type: ignore[index]
    dense = leaf.expression.dense().detach().requires_grad_()  # type: ignore[union-attr, operator]
    y = hidden @ dense.T + leaf.bias
    loss = (training.model[3:](y) - training.y).square().mean()  # type: ignore[index]
    gradient = torch.autograd.grad(loss, dense)[0]
    training.backward()
    sums = watch.take()
    for handle in watch.handles:
        handle.remove()
    assert sums is not None
    torch.testing.assert_close(sums["2"], (change * gradient).abs().sum())
    training.backward()
    assert watch.take() == {}


@pytest.mark.parametrize("host", LAYERS, ids=lambda host: host.name)
def test_the_gradient_of_a_weight_is_that_of_autograd(host: Host) -> None:
    model = rf.adapt(host.model(), point(), rank=2, targets=[host.path])
    layer: Any = model.get_submodule(host.path)
    x = host.input().detach()
    layer.stored().requires_grad_()
    y = layer(x)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).double()
    y.backward(slope)
    torch.testing.assert_close(weight_gradient(layer, x, slope), layer.stored().grad.flatten(1))


def test_the_cheap_score_needs_no_gradients_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ChangeSensitivity, "__init__")
    training = Training(point(score="factors"), 30)
    training.step(30)
    assert sum(training.ranks()) == 6


def test_the_watch_ends_with_the_handle() -> None:
    training = Training(point())
    layer = training.model[0]  # type: ignore[index]
    assert len(layer._forward_hooks) == 1
    training.step(2)
    training.handle.remove()
    assert not layer._forward_hooks
    with rf.attach(training.model, training.optimizer, total_steps=40):
        assert len(layer._forward_hooks) == 1
    rf.remove(training.model)
    assert isinstance(training.model[0], torch.nn.Linear)  # type: ignore[index]


def test_files_and_folding_have_the_ranks_that_are_left(tmp_path: Path) -> None:
    training = ends_the_same(point(), tmp_path)
    assert sum(training.ranks()) == 6
    assert all(isinstance(pair.expression, Weight) for pair in training.pairs)


def test_a_refused_attachment_leaves_no_hook_on_the_model() -> None:
    point = rf.Recipe("lora", ranks="increlora", dynamics=("lora+",))
    model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(6, 6)), point, rank=2, targets=["0"])
    before = len(model[0]._forward_hooks)
    one_rate = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(Incompatible, match=r"lora\+ wants a learning rate"):
        rf.attach(model, one_rate, total_steps=10)
    assert len(model[0]._forward_hooks) == before


def test_an_initial_rank_above_the_asked_one_is_refused() -> None:
    with pytest.raises(InvalidOption, match="initial must be at most 2, the rank asked for, not 3"):
        Training(point(initial=3), rank=2)
