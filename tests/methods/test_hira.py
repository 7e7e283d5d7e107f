"""HiRA: every entry of the weight times one plus a low-rank change."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    count,
    disturbed,
    expression_of,
    leaves_of,
    linear,
    normal,
    rank_of,
)  # fmt: skip
from methods._peft import DTYPES, HOSTS, assert_parity, twins
from peft import HiraConfig
from torch import Tensor


def layout(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    if "default" in layer.hira_embedding_A:
        yield "up", layer.hira_embedding_A["default"], Tensor.t
        yield "down", layer.hira_embedding_B["default"], Tensor.t
        return
    for name, theirs in (("up", layer.hira_B["default"]), ("down", layer.hira_A["default"])):
        yield name, theirs, lambda value, shape=theirs.shape: value.reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_outputs_and_gradients_are_pefts(host: str, dtype: torch.dtype) -> None:
    config = HiraConfig(r=3, fan_in_fan_out=host == "transposed")
    assert_parity(twins(HOSTS[host], dtype, "hira", config, layout, rank=3))


def test_the_start_is_the_base_and_only_the_up_factor_has_a_gradient() -> None:
    model, x = adapted("hira", rank=2), normal(5, 8)
    torch.testing.assert_close(model(x), linear()(x))
    dense, leaves = backward(model, x), leaves_of(model)
    torch.testing.assert_close(leaves["up"].grad, (dense * base(model)) @ leaves["down"].T)
    assert not leaves["down"].grad.any()


def test_the_rank_of_the_change_is_the_rank_times_that_of_the_weight() -> None:
    model = disturbed(adapted("hira", linear(30, 30, rank=5), rank=2))
    assert rank_of(base(model)) == 5
    assert rank_of(change(model)) == 10


def test_zeros_of_the_weight_never_change() -> None:
    plain = linear()
    zero = normal(6, 8, seed=4) > 0
    plain[0].weight.data[zero] = 0
    model = disturbed(adapted("hira", plain, rank=2))
    changed = expression_of(model).dense().detach()
    assert torch.equal(changed == 0, zero)


def test_rank_one_scales_rows_and_columns() -> None:
    model = disturbed(adapted("hira", rank=1))
    up, down = leaves_of(model)["up"].detach(), leaves_of(model)["down"].detach()
    torch.testing.assert_close(change(model), torch.diag(up[:, 0]) @ base(model) @ torch.diag(down[0]))


def test_the_parameters_are_loras() -> None:
    assert count(adapted("hira", rank=2)) == count(adapted("lora", rank=2)) == 2 * (6 + 8)
