"""VeRA: trained diagonals around a random pair that all layers share."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from methods._layers import adapted, change, count, disturbed, leaves_of, linear, normal, rank_of
from methods._peft import DTYPES, HOSTS, assert_parity, twins
from peft import VeraConfig
from torch import Tensor, nn

import rankfold as rf


def shared(ours: Any) -> dict[str, Tensor]:
    return {
        name.rpartition("_")[2]: t for name, t in ours.named_buffers() if name.startswith("rankfold_default_")
    }


def layout(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    yield "b", layer.vera_lambda_b["default"], torch.Tensor.clone
    yield "d", layer.vera_lambda_d["default"], torch.Tensor.clone


def pools(ours: nn.Module, theirs: Any) -> Iterable[tuple[Tensor, Tensor]]:
    yield shared(ours)["down"], theirs.base_model.vera_A["default"]
    yield shared(ours)["up"], theirs.base_model.vera_B["default"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", ["perceptron", "transposed", "llama"])
def test_outputs_and_gradients_are_pefts(host: str, dtype: torch.dtype) -> None:
    config = VeraConfig(r=5, fan_in_fan_out=host == "transposed")
    assert_parity(twins(HOSTS[host], dtype, "vera", config, layout, shared=pools, rank=5))


def test_the_start_is_exactly_the_base() -> None:
    x = normal(5, 8)
    model = adapted("vera", rank=20)
    assert torch.equal(model(x), linear()(x))
    assert torch.equal(leaves_of(model)["d"].detach(), torch.full((20,), 0.1, dtype=torch.float64))
    assert not leaves_of(model)["b"].any()


def test_the_pair_is_uniform_with_the_kaiming_bound_of_the_largest_layer() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    rf.adapt(model, "vera", rank=60)
    pair = shared(model)
    assert pair["down"].shape == (60, 40)
    assert pair["up"].shape == (50, 60)
    for matrix in pair.values():
        bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(matrix.shape[1])
        assert 0.99 * bound < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_one_more_rank_costs_one_more_number() -> None:
    assert count(adapted("vera", rank=5)) == 6 + 5
    assert count(adapted("vera", rank=6)) == 6 + 6


def test_layers_of_one_shape_with_equal_vectors_change_alike() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).double()
    rf.adapt(model, "vera", rank=3)
    for path in ("0", "1", "2"):
        leaves = leaves_of(model, path)
        leaves["b"].data = normal(8, seed=4)[: len(leaves["b"])]
        leaves["d"].data = normal(3, seed=5)
    torch.testing.assert_close(change(model, "0"), change(model, "1"))
    torch.testing.assert_close(change(model, "2"), change(model, "0")[:4])  # a slice of the same pair
    assert rank_of(change(model)) == 3


def test_the_seed_alone_gives_the_pair() -> None:
    first, again, other = (shared(adapted("vera", rank=3, seed=seed))["up"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_pair_is_frozen() -> None:
    model = disturbed(adapted("vera", rank=3))
    assert not any(matrix.requires_grad for matrix in shared(model).values())
