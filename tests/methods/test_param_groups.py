"""Parameter groups: every trained tensor once, with its rate and its decay."""

from typing import Any

import pytest
import torch
from methods._moving import INPUTS, perceptron
from torch import nn

import rankfold as rf
from rankfold.errors import InvalidOption, NotAdapted
from rankfold.methods import TieFollowed

POINTS = ("lora", "dora", "vera", "hra", "lora-xs", "abba", "hira", "gralora", "lora/adalora", "lora/lora+")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("train", [(), ("2",)])
def test_every_trained_tensor_is_in_exactly_one_group(point: str, train: tuple[str, ...]) -> None:
    model = rf.adapt(perceptron(), point, rank=2, targets=["0"], train=list(train))
    grouped = [id(p) for group in rf.param_groups(model, lr=1e-3) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_vectors_and_gates_do_not_decay_and_matrices_do() -> None:
    model = rf.adapt(perceptron(), "dora/adalora", rank=2, targets=["0"], train=["2"])
    groups = rf.param_groups(model, lr=1e-3, weight_decay=0.1)
    for group in groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1)
    assert {group["name"] for group in groups} == {"input", "output", "gates", "other"}


def test_groups_come_in_an_order_that_does_not_depend_on_the_process() -> None:
    def groups() -> list[tuple[Any, ...]]:
        model = rf.adapt(perceptron(), "dora/adalora", rank=2, targets="all-linear")
        return [
            (g["name"], g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]])
            for g in rf.param_groups(model, lr=1e-3, weight_decay=0.1)
        ]

    assert groups() == groups()
    assert [g[0] for g in groups()] == sorted(g[0] for g in groups())


@pytest.mark.parametrize(
    "make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop]
)
def test_any_optimizer_takes_them(make: Any) -> None:
    model = rf.adapt(perceptron(), "dora/lora+", rank=2, targets="all-linear")
    optimizer = make(rf.param_groups(model, lr=1e-2, weight_decay=0.1))
    before = model(INPUTS)
    for _ in range(2):
        model(INPUTS).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model(INPUTS), before)


def test_a_layer_that_is_used_twice_is_in_once() -> None:
    layer = nn.Linear(4, 4)
    with pytest.warns(TieFollowed):
        model = rf.adapt(nn.Sequential(layer, layer), "lora/lora+", rank=2, targets=["0"])
    assert sorted(len(group["params"]) for group in rf.param_groups(model, lr=1.0)) == [1, 1]


@pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf"), "fast", True, None])
@pytest.mark.parametrize("what", ["lr", "weight_decay"])
def test_impossible_numbers_are_refused(what: str, number: Any) -> None:
    model = rf.adapt(perceptron(), "lora", rank=2, targets="all-linear")
    with pytest.raises(InvalidOption, match=f"{what} must be a finite number"):
        rf.param_groups(model, **{"lr": 1e-3, what: number})


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(NotAdapted):
        rf.param_groups(perceptron(), lr=1e-3)
