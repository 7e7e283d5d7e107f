"""LoRD keeps the leading directions of what a layer gives, and its bias takes the mean up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compression._calibrated import compressed, inputs, layer, leaf, mean_square, normal, weight
from torch import Tensor, nn

import rankfold as rf
from rankfold.compression.shares import Unit, uniform
from rankfold.errors import BaseMismatch, Incompatible, InvalidOption


def leading(y: Tensor, rank: int = 3) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors U_r of Cov(y) and all its eigenvalues, falling."""
    values, vectors = torch.linalg.eigh(torch.cov(y.T, correction=0))
    return vectors.flip(1)[:, :rank], values.flip(0)


def test_it_equals_the_projection_on_the_eigenvectors_of_the_outputs_covariance() -> None:
    x, plain = inputs(mean=2.0), layer()
    y = plain(x).detach()
    frame, _ = leading(y)
    model = compressed(copy.deepcopy(plain), "lord", data=[x[:50], x[50:]])
    up, mean = leaf(model, "up"), y.mean(0)
    torch.testing.assert_close(weight(model), frame @ frame.T @ weight(plain))
    torch.testing.assert_close(up.T @ up, torch.eye(3).double())
    torch.testing.assert_close(leaf(model, "down"), up.T @ weight(plain))
    bias = frame @ frame.T @ plain[0].bias + (mean - frame @ frame.T @ mean)
    torch.testing.assert_close(model[0].bias, bias)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_error_has_mean_zero_and_as_mean_square_the_eigenvalues_that_are_cut(rank: int) -> None:
    x, plain = inputs(mean=2.0), layer()
    y, values = plain(x).detach(), leading(plain(x).detach())[1]
    model = compressed(copy.deepcopy(plain), "lord", rank, data=[x])
    error = (model(x) - y).detach()
    assert error.mean(0).abs().max() < 1e-12
    assert mean_square(y, model(x)) == pytest.approx(float(values[rank:].sum()), rel=1e-9)
    assert mean_square(y, model(x)) < mean_square(
        y, compressed(copy.deepcopy(plain), "svd-llm", rank, data=[x])(x)
    )


def test_without_a_bias_the_mean_counts_and_the_uncentred_metric_is_the_best() -> None:
    x, plain = inputs(mean=2.0), layer(bias=False)
    mine = compressed(copy.deepcopy(plain), "lord", data=[x])
    other = compressed(copy.deepcopy(plain), "svd-llm", data=[x])
    torch.testing.assert_close(weight(mine), weight(other))
    assert mine[0].bias is None


def test_a_layer_without_a_bias_gets_one_if_asked_and_is_then_nearer(tmp_path: Path) -> None:
    x, plain = inputs(mean=2.0), layer(bias=False)
    without = compressed(copy.deepcopy(plain), "lord", data=[x])
    model = compressed(copy.deepcopy(plain), "lord", data=[x], add_bias=True)
    y = plain(x).detach()
    values = leading(y)[1]
    assert mean_square(y, model(x)) == pytest.approx(float(values[3:].sum()), rel=1e-9)
    assert mean_square(y, model(x)) < mean_square(y, without(x))
    assert "0.bias" in dict(model.named_parameters())
    folder = rf.save(model, tmp_path / "saved")
    again = rf.load(copy.deepcopy(plain), folder)
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    other = layer()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(BaseMismatch, match="0 is to get a bias and has one"):
        rf.load(other, folder)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    broken = copy.deepcopy(plain)
    with pytest.raises(rf.errors.RankfoldError):
        rf.load(nn.Sequential(nn.Linear(3, 3, bias=False)), folder)
    assert list(dict(broken.named_parameters())) == ["0.weight"]
    expected = model(x)
    torch.testing.assert_close(rf.fold(model)(x), expected)
    assert type(model[0]) is nn.Linear


def test_a_bias_that_is_given_for_nothing_is_taken_away_again(tmp_path: Path) -> None:
    x, plain = inputs(mean=2.0), layer(bias=False)
    folder = rf.save(compressed(copy.deepcopy(plain), "lord", data=[x], add_bias=True), tmp_path / "saved")
    other = layer(bias=False, width=11)
    with pytest.raises(rf.errors.RankfoldError):
        rf.load(other, folder)
    assert list(dict(other.named_parameters())) == ["0.weight"]
    assert torch.equal(other[0](x[:, :11]), x[:, :11] @ other[0].weight.T)


def test_a_stock_class_that_would_lose_the_bias_is_not_made_of_it() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model, ids = LlamaForCausalLM(config), torch.randint(20, (4, 8))
    options: dict[str, Any] = {
        "keep": 0.9,
        "data": [{"input_ids": ids}],
        "targets": "re:.*gate_proj",
        "progress": False,
    }
    rf.compress(model, "lord", add_bias=True, **options)
    with pytest.raises(Incompatible, match="was given a bias, which a stock LlamaForCausalLM has not"):
        rf.fold(model)
    plain = rf.compress(LlamaForCausalLM(config), "lord", **options)
    assert type(rf.fold(plain)) is LlamaForCausalLM


@pytest.mark.parametrize("add_bias", [False, True])
def test_sequential_calibration_stands_behind_given_biases_too(add_bias: bool) -> None:
    x = inputs(mean=2.0)
    plain = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 10)).double()
    plain[0].weight.data, plain[2].weight.data = normal(12, 12, seed=6), normal(10, 12, seed=7)
    model = rf.compress(
        copy.deepcopy(plain), "lord", keep=0.5, data=[x], calibration="sequential", add_bias=add_bias,
        progress=False,
    )  # fmt: skip
    assert (model[0].bias is not None) == add_bias
    hidden = model[:2](x).detach()
    wanted = plain[2](hidden)
    found = model[2](hidden)
    frame, values = leading(wanted.detach(), rank=2)
    torch.testing.assert_close(
        model[2].expression.dense().detach(),
        frame @ frame.T @ plain[2].weight.detach(),
    )
    assert mean_square(wanted, found) == pytest.approx(float(values[2:].sum()), rel=1e-9)


def test_features_of_low_rank_survive_where_the_weight_is_of_full_rank() -> None:
    x = normal(300, 3, seed=1) @ normal(3, 12, seed=2) + 0.01 * normal(300, 12, seed=3)
    plain = layer()
    plain[0].weight.data = torch.linalg.qr(normal(12, 12, seed=4)).Q[:10]
    y = plain(x).detach()
    errors = {m: mean_square(y, compressed(copy.deepcopy(plain), m, data=[x])(x)) for m in ("lord", "svd")}
    assert errors["lord"] < 1e-3 * errors["svd"]


def test_ranks_are_rounded_down_to_a_multiple_that_kernels_like() -> None:
    units = [Unit("wide", (400, 300)), Unit("narrow", (40, 30))]
    budget = 0.8 * sum(unit.dense for unit in units)
    plain, rounded = uniform(units, int(budget)), uniform(units, int(budget), multiple=64)
    assert plain == {"wide": 137, "narrow": 13}
    assert rounded == {"wide": 128, "narrow": 13}  # less than one multiple stays as it is
    with pytest.raises(InvalidOption, match="multiple must be at least 1, not 0"):
        uniform(units, int(budget), multiple=0)
    with pytest.raises(InvalidOption, match=r"multiple must be a whole number, not 1\.5"):
        compressed(layer(), "svd", share=("uniform", {"multiple": 1.5}))
    assert leaf(compressed(layer(), "svd", 3, share=("uniform", {"multiple": 2})), "down").shape[0] == 2
