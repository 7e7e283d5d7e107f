"""Uniform ranks: what a point without a rank rule does too."""

import torch
from methods._layers import adapted, leaves_of, linear, normal

import rankfold as rf
from rankfold.methods.ranks.uniform import uniform
from rankfold.methods.rules import Unit


def test_it_is_the_adapter_without_a_rule() -> None:
    plain, ruled = (adapted(point, rank=3, alpha=12) for point in ("lora/pissa", "lora/pissa/uniform"))
    for name, value in leaves_of(plain).items():
        assert torch.equal(value, leaves_of(ruled)[name])
    assert torch.equal(plain(normal(5, 8)), ruled(normal(5, 8)))


def test_a_weight_gets_no_more_than_it_can_hold_in_multiples() -> None:
    units = [Unit("a", (8, 8), limit=8), Unit("b", (8, 8), limit=5, multiple=2), Unit("c", (8, 8))]
    assert uniform(units, 6) == {"a": 6, "b": 4, "c": 6}


def test_a_weight_that_was_named_is_capped_too() -> None:
    model = rf.adapt(linear(4, 8), "lora/uniform", rank=6, targets=["0"])
    assert leaves_of(model)["up"].shape == (4, 4)
