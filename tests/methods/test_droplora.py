"""DropLoRA: noise between the factors."""

import itertools

import pytest
import torch
from methods._layers import adapted, disturbed, leaves_of, linear, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption, UnsupportedLayer


def droplora(rank: int = 4, **options: float) -> nn.Module:
    return disturbed(adapted(rf.Recipe(("droplora", options)), rank=rank))


def inner(model: nn.Module, x: Tensor) -> Tensor:
    return x @ leaves_of(model)["down"].T


def test_evaluation_and_folding_are_loras() -> None:
    model, x = droplora().eval(), normal(5, 8)
    expected = linear()(x) + 2 * inner(model, x) @ leaves_of(model)["up"].T
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(rf.fold(model)(x), expected)


def test_without_probability_training_is_loras_too() -> None:
    model, x = droplora(probability=0.0), normal(5, 8)
    torch.testing.assert_close(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("tokens", [6, 400])
def test_every_output_in_training_is_that_of_some_mask(tokens: int) -> None:
    model, x = droplora().train(), normal(tokens, 8)
    up = leaves_of(model)["up"]
    masks = 2 * torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).double()
    possible = linear()(x) + 2 * (masks[:, None] * inner(model, x)) @ up.T  # (mask, token, out)
    distances = (possible - model(x)).abs().amax(-1)
    assert distances.amin(0).max() < 1e-12
    assert len(distances.argmin(0).unique()) > 1
    model.eval()
    torch.testing.assert_close(possible.mean(0), model(x))


def test_one_mask_for_all_tokens_stops_the_gradients_of_what_is_off() -> None:
    model, x = droplora(rank=6, together=True).train(), normal(30, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model(x).square().sum().backward()
    up, down = (leaves_of(model)[name].grad for name in ("up", "down"))
    off = up.abs().amax(0) == 0
    assert 0 < off.sum() < 6
    assert torch.equal(off, down.abs().amax(1) == 0)


def test_a_start_that_is_subtracted_is_not_thinned() -> None:
    model = adapted(rf.Recipe(("droplora", {}), "pissa"), rank=2).train()
    x = normal(4, 8)
    model.eval()
    torch.testing.assert_close(model(x), linear()(x))
    assert [str(term).count("dropout") for term in model[0].expression.terms] == [0, 1, 0]


def test_a_layer_without_an_input_between_the_factors_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match="droplora"):
        adapted("droplora", nn.Sequential(nn.Embedding(5, 4)), rank=2)
    with pytest.raises(InvalidOption, match="probability"):
        droplora(probability=1.0)
