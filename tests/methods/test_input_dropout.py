"""Dropout of what the change reads, in the structures that have it as an option of their own."""

import itertools

import pytest
import torch
from methods._layers import adapted, base, change, convolution, disturbed, linear, normal
from torch import nn

import rankfold as rf
from rankfold.errors import InvalidOption

METHODS = ("diablo", "dora", "droplora", "flora-tucker", "lora", "miss", "mos", "reslora")


def dropped(method: str, probability: float, host: nn.Module | None = None) -> nn.Module:
    quiet = {"diablo": {"blocks": 2}, "droplora": {"probability": 0.0}}
    recipe = rf.Recipe((method, {"dropout": probability, **quiet.get(method, {})}))
    return disturbed(adapted(recipe, host, rank=None if method == "diablo" else 2))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dora"])  # there, rows are scaled
def test_the_change_reads_a_thinned_input_and_the_base_all_of_it(method: str) -> None:
    model, x = dropped(method, 0.5), normal(40, 8)
    plain = x @ base(model).T + model[0].bias
    masks = 2 * torch.tensor(list(itertools.product((0.0, 1.0), repeat=8))).double()
    possible = (masks[:, None] * x) @ change(model).T  # (mask, token, out)
    distances = (possible - (model.train()(x) - plain)).abs().amax(-1)
    assert distances.amin(0).max() < 1e-12
    assert len(distances.argmin(0).unique()) > 1
    torch.testing.assert_close(model.eval()(x), plain + x @ change(model).T)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_and_folding_know_nothing_of_it(method: str) -> None:
    model, x = dropped(method, 0.5).eval(), normal(5, 8)
    torch.testing.assert_close(model(x), dropped(method, 0.0).eval()(x))
    torch.testing.assert_close(rf.fold(dropped(method, 0.5))(x), model(x))
    assert not torch.allclose(model(x), linear()(x))


def test_a_kernels_change_reads_thinned_channels_too() -> None:
    model, x = dropped("flora-tucker", 0.5, convolution()), normal(2, 4, 7, 6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noisy = torch.stack([model.train()(x).detach() for _ in range(400)])
    expected, plain = model.eval()(x).detach(), convolution()(x).detach()
    assert not torch.allclose(noisy[0], expected)
    assert (noisy.mean(0) - expected).norm() < 0.1 * (expected - plain).norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("probability", [1.0, -0.1])
def test_a_probability_outside_its_range_is_refused(method: str, probability: float) -> None:
    with pytest.raises(InvalidOption, match="dropout"):
        dropped(method, probability)
