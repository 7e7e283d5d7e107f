"""MiSS: one trained shard, repeated along the input."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    change,
    count,
    disturbed,
    expression_of,
    leaves_of,
    linear,
    normal,
    rank_of,
    sgd_step,
)
from methods._peft import DTYPES, HOSTS, assert_parity, twins
from peft import MissConfig
from torch import Tensor


def shard(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    yield "shard", layer.miss_block["default"], Tensor.t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [4, 5])  # 5 divides no side
def test_the_shard_is_pefts(dtype: torch.dtype, rank: int) -> None:
    config = MissConfig(r=rank, init_weights=True)
    assert_parity(twins(HOSTS["perceptron"], dtype, "miss", config, shard, rank=rank))


def test_columns_of_the_change_repeat_and_its_rank_is_the_shards() -> None:
    model = disturbed(adapted("miss", linear(9, 11), rank=3))
    moved = change(model)
    torch.testing.assert_close(moved[:, 3:], moved[:, :-3])
    assert rank_of(moved) == 3
    assert count(model) == 3 * 9


def test_a_step_moves_the_weight_by_the_sum_of_the_gradients_shards() -> None:
    model = adapted("miss", linear(5, 7), rank=3)
    dense = backward(model, normal(4, 7))
    tiled = torch.eye(3).double().repeat(1, 3)[:, :7]
    sgd_step(model, 0.1)
    torch.testing.assert_close(change(model), -0.1 * dense @ tiled.T @ tiled)


def test_the_start_is_the_base_and_everything_has_a_gradient() -> None:
    model, x = adapted("miss", rank=2), normal(5, 8)
    assert torch.equal(model(x), linear()(x))
    backward(model, x)
    assert all(p.grad.abs().min() > 0 for p in model.parameters() if p.requires_grad)


def test_bone_on_a_weight_of_zeros_is_miss_with_its_blocks_as_the_shard() -> None:
    plain = linear(6, 9)
    plain[0].weight.data.zero_()
    model = disturbed(adapted("bone", plain, rank=3))
    shards = leaves_of(model)["blocks"].detach().flatten(0, 1)
    torch.testing.assert_close(change(model), shards.repeat(1, 3))


def test_only_the_shard_is_multiplied() -> None:
    expression = expression_of(adapted("miss", linear(5, 7), rank=3))
    assert expression.macs(11) == 11 * (5 * 7 + 5 * 3)
