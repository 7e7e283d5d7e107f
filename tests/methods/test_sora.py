"""SoRA: gates under proximal steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._dynamic import Training, ends_the_same, perceptron
from methods._layers import linear, normal

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.ranks.sora import shrunk


def point(structure: str = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return rf.Recipe(structure, init, ("sora", {"threshold": 0.01, "penalty": 0.1, **options}))


def test_the_start_is_the_base_and_only_the_up_factor_has_a_gradient() -> None:
    training = Training(point(penalty=0.0))
    assert torch.equal(training.output(), perceptron()(training.x))
    training.backward()
    for pair in training.pairs:
        assert pair.gate is not None
        assert pair.up.grad.norm() > 0
        assert not pair.down.grad.any()
        assert not pair.gate.grad.any()


def test_gates_before_a_zero_product_are_standard_normal_and_others_are_one() -> None:
    model = rf.adapt(perceptron((64, 48, 64)), point(), rank=48, targets=["0", "2"])
    gates = torch.cat([pair.gate.detach() for pair in Training(model).pairs if pair.gate is not None])
    assert abs(gates.mean()) < 0.3
    assert abs(gates.std() - 1) < 0.2
    for init in ("pissa", "olora"):
        training = Training(point(init=init))
        assert all((gate == 1).all() for gate in training.gates())
        torch.testing.assert_close(training.output(), perceptron()(training.x))


def test_shrinking_is_the_soft_threshold_on_both_sides_of_zero() -> None:
    values = torch.tensor([0.15, -0.15, 0.1, 0.05, -0.05, 0.0]).double()
    expected = torch.tensor([0.05, -0.05, 0.0, 0.0, 0.0, 0.0]).double()
    torch.testing.assert_close(shrunk(values, 0.1), expected)


def test_shrinking_is_the_proximal_step_of_the_l1_norm() -> None:
    grid = torch.linspace(-3, 3, 60001).double()
    for value in (-1.3, -0.2, 0.05, 0.4, 2.0):
        best = grid[(0.5 * (grid - value) ** 2 + 0.3 * grid.abs()).argmin()]
        torch.testing.assert_close(shrunk(torch.tensor([value]).double(), 0.3)[0], best, rtol=0, atol=1e-4)


def test_the_operator_of_the_published_code_also_kills_up_to_twice_the_threshold() -> None:
    values = torch.tensor([0.15, -0.19, 0.25, -0.25, 0.125]).double()
    expected = torch.tensor([0.0, 0.0, 0.15, -0.15, 0.125]).double()
    torch.testing.assert_close(shrunk(values, 0.1, dead_zone=True)[:4], expected[:4])
    assert shrunk(torch.tensor([0.125]), 0.125, dead_zone=True) == 0.125  # neither shrunk nor zeroed


def test_every_step_ends_with_the_proximal_step_on_top_of_the_optimizers() -> None:
    plain, sparse = Training(point(threshold=0.0)), Training(point(threshold=0.02))
    plain.step()
    sparse.step()
    for own, other in zip(sparse.gates(), plain.gates(), strict=True):
        torch.testing.assert_close(own, shrunk(other, 0.02))


def test_the_smooth_term_is_the_gradient_of_the_mean_magnitude_of_all_gates() -> None:
    training, plain = Training(point(penalty=3.0)), Training(point(penalty=0.0))
    training.step(2)
    with torch.no_grad():
        for pair, other in zip(training.pairs, plain.pairs, strict=True):
            for own, base in ((pair.up, other.up), (pair.down, other.down), (pair.gate, other.gate)):
                base.copy_(own)  # type: ignore[union-attr, arg-type]
    training.backward()
    plain.backward()
    gates = [pair.gate for pair in training.pairs]
    slopes = torch.autograd.grad(3.0 * torch.cat(gates).abs().mean(), gates)  # type: ignore[arg-type]
    with torch.no_grad():
        training.handle.methods["ranks=sora"].gradients_ready(training.run)
    for pair, other, slope in zip(training.pairs, plain.pairs, slopes, strict=True):
        torch.testing.assert_close(pair.gate.grad, other.gate.grad + slope)  # type: ignore[union-attr]


def test_zeros_are_exact_and_go_without_changing_the_output(tmp_path: Path) -> None:
    training = ends_the_same(point(threshold=0.05), tmp_path)
    assert sum(training.ranks()) < 6
    assert all((gate != 0).all() or len(gate) == 1 for gate in training.gates())


def test_zeros_stay_where_they_are_while_training_is_not_over() -> None:
    training = Training(point(threshold=0.05))
    training.step(35)
    training.handle.remove()
    assert training.ranks() == [2, 2, 2]


@pytest.mark.parametrize(("threshold", "rank"), [(1e-2, 2), (0.0, 8)])
def test_a_planted_rank_is_found_in_a_larger_adapter(threshold: float, rank: int) -> None:
    model = linear(10, 12)
    wanted = model[0].weight.data + 0.4 * normal(10, 2, seed=3) @ normal(2, 12, seed=4)  # type: ignore[index]
    x = normal(200, 12)
    y = x @ wanted.T + model[0].bias.detach()  # type: ignore[index]
    rf.adapt(model, point(threshold=threshold, penalty=0.3), rank=8, targets=["0"])
    training = Training(model, 400, rate=2e-2)
    training.x, training.y = x, y
    training.step(400)
    training.handle.remove()
    assert training.ranks() == [rank]
    assert (training.output() - y).square().mean() < 1e-3 * y.square().mean()


def test_the_threshold_climbs_by_stages() -> None:
    training = Training(point(threshold=0.1, last=0.5, stages=3), 30)
    rule: Any = training.handle.methods["ranks=sora"]
    found = []
    for step in range(1, 31):
        training.run.state["clock"] = step
        found.append(rule.xi(training.run))
    assert found == pytest.approx([0.1] * 10 + [0.3] * 10 + [0.5] * 10)


def test_stages_need_the_number_of_steps_and_a_constant_threshold_does_not() -> None:
    Training(point(), None).step(2)
    with pytest.raises(InvalidOption, match="sora needs total_steps"):
        Training(point(last=0.5, stages=3), None)


@pytest.mark.parametrize("options", [{"stages": 3}, {"last": 0.5}])
def test_stages_and_the_threshold_of_the_last_one_are_given_together(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="give last and stages > 1, or neither"):
        Training(point(**options))


@pytest.mark.parametrize("rule", ["sora", "codyra"])
def test_a_start_behind_gates_of_zero_is_refused(rule: str) -> None:
    with pytest.raises(Incompatible, match="random starts behind a gate that is zero"):
        rf.adapt(perceptron(), rf.Recipe("lora", "random", rule))


def test_gates_get_no_weight_decay() -> None:
    model = rf.adapt(perceptron(), point(), rank=2, targets=["0"])
    assert all(
        g["weight_decay"] == 0
        for g in rf.param_groups(model, lr=1.0, weight_decay=0.1)
        if g["name"] == "gates"
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    with pytest.raises(Incompatible, match="weight decay"):
        rf.attach(model, optimizer)
