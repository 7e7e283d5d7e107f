"""Bone: blocks that multiply the weight's own shards."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    disturbed,
    leaves_of,
    linear,
    normal,
    rank_of,
)  # fmt: skip
from methods._peft import DTYPES, HOSTS, assert_parity, twins
from peft import MissConfig
from torch import Tensor

from rankfold.errors import InvalidOption


def blocks(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    yield "blocks", layer.miss_block["default"], torch.Tensor.clone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_blocks_are_pefts(dtype: torch.dtype) -> None:
    config = MissConfig(r=2, init_weights="bat")
    assert_parity(twins(HOSTS["perceptron"], dtype, "bone", config, blocks, rank=2))


def test_every_shard_plus_the_identity_is_multiplied_by_its_rows_block() -> None:
    model = disturbed(adapted("bone", linear(6, 9), rank=3))
    given, moved, matrix = leaves_of(model)["blocks"].detach(), change(model), base(model)
    identity = torch.eye(3, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            place = (slice(3 * i, 3 * i + 3), slice(3 * j, 3 * j + 3))
            torch.testing.assert_close(moved[place], (matrix[place] + identity) @ given[i])
    assert rank_of(change(disturbed(adapted("bone", linear(12, 12), rank=3)))) == 12


@pytest.mark.parametrize("method", ["bone"])
def test_the_start_is_the_base_and_everything_has_a_gradient(method: str) -> None:
    model, x = adapted(method, rank=2), normal(5, 8)
    assert torch.equal(model(x), linear()(x))
    backward(model, x)
    assert all(p.grad.abs().min() > 0 for p in model.parameters() if p.requires_grad)


def test_a_rank_that_divides_no_side_becomes_the_largest_smaller_divisor() -> None:
    assert leaves_of(adapted("bone", linear(12, 18), rank=4))["blocks"].shape == (4, 3, 3)


def test_sides_without_a_common_divisor_are_refused() -> None:
    with pytest.raises(InvalidOption, match="bone cannot cut 5x7 into square shards of 2 to 3"):
        adapted("bone", linear(5, 7), rank=3)
