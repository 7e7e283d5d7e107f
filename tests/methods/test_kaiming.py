"""The Kaiming start: a random down factor, a zero up factor."""

import math

import pytest
import torch
from methods._layers import adapted, convolution, leaves_of, linear
from torch import nn

import rankfold as rf
from rankfold.errors import InvalidOption


@pytest.mark.parametrize(("a", "bound"), [(math.sqrt(5), 1 / math.sqrt(50)), (0.0, math.sqrt(6 / 50))])
def test_the_down_factor_is_uniform_with_its_bound_and_the_up_factor_is_zero(a: float, bound: float) -> None:
    leaves = leaves_of(adapted(rf.Recipe("lora", ("kaiming", {"a": a})), linear(40, 50), rank=40))
    down = leaves["down"].detach()
    assert 0.99 * bound < down.abs().max() <= bound
    assert down.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert down.mean().abs() < 0.1 * bound
    assert not leaves["up"].any()


def test_the_default_is_loras() -> None:
    assert leaves_of(adapted("lora", linear(6, 9), rank=6))["down"].abs().max() <= 1 / 3


def test_the_fan_in_of_a_convolution_counts_its_window() -> None:
    down = leaves_of(adapted("lora", convolution(6, 4, (3, 2)), rank=6))["down"]
    assert 0.8 < down.abs().max() * math.sqrt(24) <= 1


def test_an_embedding_starts_with_a_normal_factor_that_rows_of_zeros_meet() -> None:
    leaves = leaves_of(adapted("lora", nn.Sequential(nn.Embedding(80, 50)), rank=40))
    assert leaves["up"].shape == (80, 40)
    assert not leaves["up"].any()
    assert leaves["down"].std().item() == pytest.approx(1, abs=0.05)
    assert leaves["down"].abs().max() > 2


def test_every_layer_draws_numbers_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rf.adapt(model, "lora", rank=2)
    assert not torch.equal(leaves_of(model, "0")["down"], leaves_of(model, "1")["down"])


def test_a_negative_slope_is_refused() -> None:
    with pytest.raises(InvalidOption, match="a must be at least 0"):
        adapted(rf.Recipe("lora", ("kaiming", {"a": -1.0})), rank=2)
