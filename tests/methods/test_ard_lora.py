"""ARD-LoRA: a trained amount per weight opens its terms one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods._layers import base, change, expression_of, leaves_of, linear, normal, rank_of
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.ranks.ard_lora import Ramp
from rankfold.weights import trained


def adapted(point: str | rf.Recipe | None = None, rank: int = 2, **options: Any) -> nn.Module:
    recipe = rf.Recipe("lora", ranks=("ard-lora", options)) if point is None else point
    return rf.adapt(linear(), recipe, rank=rank, targets=["0"])


def amount(model: nn.Module) -> torch.Tensor:
    return leaves_of(model)["gate"]


def gates(model: nn.Module) -> torch.Tensor:
    ramp = next(iter(expression_of(model).pairs())).gate
    assert isinstance(ramp, Ramp)
    return ramp.tensor().detach()


@given(st.floats(0, 3, allow_subnormal=False))
def test_the_gates_sum_to_the_amount_of_rank(value: float) -> None:
    ramp = Ramp(trained(torch.tensor([value], dtype=torch.float64), "gate"), 2.0, 6, "ramp")
    torch.testing.assert_close(ramp.tensor().sum(), torch.tensor(2 * value, dtype=torch.float64))
    assert (ramp.tensor().diff() <= 0).all()


@pytest.mark.parametrize(("value", "rank"), [(0.5, 1), (1.0, 2), (1.5, 3), (2.0, 4)])
def test_a_whole_amount_is_exactly_an_adapter_of_that_rank(value: float, rank: int) -> None:
    model = adapted()
    leaves = leaves_of(model)
    leaves["up"].data = normal(6, 4)
    amount(model).data.fill_(value)
    whole = 0.5 * leaves["up"][:, :rank].detach() @ leaves["down"][:rank].detach()
    scale = next(iter(expression_of(model).pairs())).scale
    torch.testing.assert_close(change(model), whole * scale / 0.5)
    assert rank_of(change(model)) == rank


@pytest.mark.parametrize(
    ("point", "opened"), [("lora/ard-lora", 2), ("lora/pissa/ard-lora", 4), ("dora/ard-lora", 2)]
)
def test_the_first_output_is_the_bases_and_the_open_terms_are_those_asked_for(
    point: str, opened: int
) -> None:
    model = adapted(point)
    x = normal(4, 8)
    torch.testing.assert_close(model(x), linear()(x))
    assert gates(model).sum() == opened


def test_a_start_behind_a_closed_gate_is_refused_because_the_penalty_would_keep_it_closed() -> None:
    with pytest.raises(Incompatible, match="behind a gate"):
        adapted("lora/random/ard-lora")


def test_beside_a_whole_rank_both_gates_pass_their_gradient() -> None:
    value = trained(torch.tensor([1.0], dtype=torch.float64), "gate")
    for term in (1, 2):  # the last open one and the first closed one of two
        value.value.grad = None
        Ramp(value, 2.0, 4, "ramp").tensor()[term].backward()
        assert value.value.grad == 2


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = normal(64, 8)
    target = x @ (base(model) + normal(6, 2, seed=4) @ normal(2, 8, seed=5) / 4).T
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def test_a_larger_penalty_leaves_a_smaller_amount() -> None:
    left = []
    for penalty in (0.0, 0.01, 0.1, 1.0):
        model = adapted(penalty=penalty, variation=0.0)
        optimizer = torch.optim.Adam(rf.param_groups(model, lr=2e-2))
        with rf.attach(model, optimizer):
            train(model, optimizer, 150)
        left.append(amount(model).item())
    assert left[0] > left[1] > left[2] >= left[3] >= 0
    assert left[3] < 0.1


def test_the_amount_stays_within_what_the_gates_can_show() -> None:
    model = adapted(penalty=100.0)
    optimizer = torch.optim.SGD(rf.param_groups(model, lr=1.0))
    with rf.attach(model, optimizer):
        train(model, optimizer, 2)
    assert amount(model) == 0


def penalty_gradient(model: nn.Module, *, moved: float | None, **options: Any) -> float:
    """Return what the rule adds to the amount's gradient after it has moved by so much."""
    optimizer = torch.optim.SGD(rf.param_groups(model, lr=0.0))
    with rf.attach(model, optimizer) as handle:
        rule, run = handle.methods["ranks=ard-lora"], handle.run
        assert run is not None
        run.enter("ranks=ard-lora")
        if moved is not None:
            amount(model).grad = torch.zeros(1, dtype=torch.float64)
            with torch.no_grad():
                rule.gradients_ready(run)
                amount(model).data += moved
        amount(model).grad = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            rule.gradients_ready(run)
    return float(amount(model).grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("moved", "gradient"), [(None, 0.5), (0.1, 0.75), (-0.1, 0.25)])
def test_the_variation_works_against_the_last_move(moved: float | None, gradient: float) -> None:
    model = adapted(penalty=0.5, variation=0.5)
    assert penalty_gradient(model, moved=moved) == pytest.approx(gradient)


def test_resumed_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = adapted("dora/ard-lora")
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-2))
    with rf.attach(model, optimizer):
        train(model, optimizer, 7)
        rf.save(model, tmp_path / "adapter")
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        train(model, optimizer, 6)
    again = rf.load(linear(), tmp_path / "adapter")
    other = torch.optim.AdamW(rf.param_groups(again, lr=1e-2))
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    with rf.attach(again, other):
        train(again, other, 6)
    x = normal(4, 8)
    assert torch.equal(model(x), again(x))


def test_squeezing_drops_the_closed_terms_and_keeps_the_function(tmp_path: Path) -> None:
    model = adapted()
    leaves_of(model)["up"].data = normal(6, 4)
    amount(model).data.fill_(0.8)
    before = change(model)
    rf.squeeze(model)
    assert leaves_of(model)["up"].shape[1] == 2
    torch.testing.assert_close(change(model), before)
    x = normal(4, 8)
    assert torch.equal(rf.load(linear(), rf.save(model, tmp_path / "adapter"))(x), model(x))


def test_the_amount_gets_no_weight_decay() -> None:
    model = adapted()
    groups = {g["name"]: g for g in rf.param_groups(model, lr=0.1, weight_decay=0.1)}
    assert groups["gates"]["weight_decay"] == 0
    assert any(p is amount(model) for p in groups["gates"]["params"])


@pytest.mark.parametrize("options", [{"penalty": -1.0}, {"variation": -1.0}, {"most": 0.5}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match=f"ard-lora: {next(iter(options))} must be"):
        adapted(**options)
