"""AutoLoRA: selection weights learned on two levels give every weight its rank."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods._layers import expression_of, leaves_of, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.ranks.autolora import hypergradient, search, selected


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12))
def test_the_rank_is_from_one_to_the_number_of_terms(theta: list[float]) -> None:
    assert 1 <= selected(torch.tensor(theta)) <= len(theta)


@given(st.floats(-20, 20), st.integers(1, 12))
def test_equal_selection_weights_keep_every_term(value: float, rank: int) -> None:
    assert selected(torch.full((rank,), value)) == rank


def test_the_threshold_is_on_the_softmax_and_so_the_signs_of_theta_do_not_matter() -> None:
    theta = torch.tensor([0.0, 0.1, 3.0, 2.9])
    assert selected(theta) == selected(theta - 10) == 2


def quadratic(seed: int, power: int) -> tuple[Tensor, Tensor, Any, Any]:
    """Return w, theta and two losses, quadratic in both together or with a power of their product."""
    w, theta = normal(4, seed=seed).requires_grad_(), normal(3, seed=seed + 1).requires_grad_()
    mixed, curve = normal(4, 3, seed=seed + 2), normal(4, 4, seed=seed + 3)

    def training() -> Tensor:
        return (w @ curve).square().sum() + (w @ mixed @ theta) ** power

    def validation() -> Tensor:
        return (w - normal(4, seed=9)).square().sum() + (theta * w[:3]).sum()

    return w, theta, training, validation


def exact(w: Tensor, theta: Tensor, training: Any, validation: Any, rate: float) -> Tensor:
    """Return d/dtheta of L_val(w - rate dL_train/dw, theta), differentiated through the step."""
    (gradient,) = torch.autograd.grad(training(), w, create_graph=True)
    ahead = w - rate * gradient
    total = (ahead - normal(4, seed=9)).square().sum() + (theta * ahead[:3]).sum()
    return torch.autograd.grad(total, theta)[0]


def test_the_hypergradient_is_exact_where_the_training_loss_is_bilinear() -> None:
    w, theta, training, validation = quadratic(20, power=1)
    before = w.detach().clone()
    (found,) = hypergradient([w], [theta], training, validation, 0.05)
    torch.testing.assert_close(found, exact(w, theta, training, validation, 0.05), atol=1e-9, rtol=1e-9)
    assert torch.equal(w, before)


def test_elsewhere_its_error_falls_with_the_square_of_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    w, theta, training, validation = quadratic(20, power=3)
    true, errors = exact(w, theta, training, validation, 0.05), []
    for probe in (0.2, 0.1):
        monkeypatch.setattr(sys.modules[hypergradient.__module__], "_PROBE", probe)
        (found,) = hypergradient([w], [theta], training, validation, 0.05)
        errors.append(float((found - true).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).double()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Sides(nn.Module):
    """Two weights side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.rich, self.poor = net()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.rich(x), self.poor(x)], -1)


def planted(seed: int, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and outputs; one weight differs by a matrix of rank 4, the other by one of rank 1."""
    teacher = Sides()
    teacher.rich.weight.data += normal(8, 4, seed=50) @ normal(4, 8, seed=51) / 4
    teacher.poor.weight.data += normal(8, 1, seed=52) @ normal(1, 8, seed=53) / 2
    inputs = [normal(64, 8, seed=seed + index) for index in range(count)]
    return [(x, teacher(x).detach()) for x in inputs]


def batches(seed: int, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    teacher = net(1)
    inputs = [normal(64, 8, seed=seed + index) for index in range(count)]
    return [(x, teacher(x).detach()) for x in inputs]


def test_the_search_orders_weights_by_the_ranks_that_were_planted() -> None:
    model = rf.adapt(Sides(), "lora", rank=5, alpha=10)
    found = search(model, planted(60), planted(70), steps=100, loss=loss, lr=3e-2, selection_lr=0.3)
    assert found["rich"] > found["poor"] >= 1


def test_the_search_leaves_the_model_as_it_was() -> None:
    model = rf.adapt(net(), "lora", rank=3, alpha=6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    formula = repr(expression_of(model))
    search(model, batches(60), batches(70), steps=3, loss=loss, lr=0.1)
    assert repr(expression_of(model)) == formula
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in model.parameters())


def test_selection_weights_move_by_validation_data_only() -> None:
    model = rf.adapt(net(), "lora", rank=3, alpha=6)
    calls: list[str] = []

    def named(candidate: nn.Module, batch: tuple[str, Tensor, Tensor]) -> Tensor:
        calls.append(batch[0])
        value = loss(candidate, batch[1:])
        return value if batch[0] == "training" else 0 * value

    training = [("training", *batch) for batch in batches(60)]
    validation = [("validation", *batch) for batch in batches(70)]
    found = search(model, training, validation, steps=20, loss=named, lr=0.1, selection_lr=0.1)
    assert found == {"0": 3, "1": 3}
    assert {"training", "validation"} == set(calls)


def test_the_ranks_found_make_an_adapter_that_divides_alpha_by_its_own_rank() -> None:
    recipe = rf.Recipe("lora", ranks=("autolora", {"ranks": {"*": 2, "0": 4}}))
    model = rf.adapt(net(), recipe, rank=5, alpha=8)
    assert leaves_of(model, "0")["up"].shape[1] == 4
    assert leaves_of(model, "1")["up"].shape[1] == 2
    scales = [next(iter(expression_of(model, path).pairs())).scale for path in ("0", "1")]
    assert scales == [2, 4]


def test_without_ranks_the_refusal_names_the_search() -> None:
    with pytest.raises(InvalidOption, match=r"rankfold\.methods\.ranks\.autolora\.search"):
        rf.adapt(net(), "lora/ranks=autolora", rank=4)


def test_a_weight_without_an_entry_is_refused() -> None:
    with pytest.raises(InvalidOption, match="no entry for 1"):
        rf.adapt(net(), rf.Recipe("lora", ranks=("autolora", {"ranks": {"0": 4}})), rank=4)


@pytest.mark.parametrize("rank", [-1, True, "3", 2.0])
def test_an_entry_that_is_no_rank_is_refused(rank: Any) -> None:
    with pytest.raises(InvalidOption, match="whole number"):
        rf.adapt(net(), rf.Recipe("lora", ranks=("autolora", {"ranks": {"*": rank}})), rank=4)


def test_an_adapter_with_gates_or_without_one_product_is_refused() -> None:
    for point in ("lora/adalora", "abba"):
        model = rf.adapt(net(), point, rank=2)
        with pytest.raises(Incompatible, match="one trained product without a gate"):
            search(model, batches(60), batches(70), steps=1, loss=loss)


def test_a_generator_that_runs_out_is_refused_and_the_model_is_as_it_was() -> None:
    model = rf.adapt(net(), "lora", rank=2)
    formula = repr(expression_of(model))
    with pytest.raises(InvalidOption, match="not a generator"):
        search(model, (batch for batch in batches(60)), batches(70), steps=5, loss=loss)
    assert repr(expression_of(model)) == formula


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(InvalidOption, match="autolora's search: steps must be at least 1, not 0"):
        search(rf.adapt(net(), "lora", rank=2), [], [], steps=0)
