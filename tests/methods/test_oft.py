"""OFT: block-diagonal rotations on the input side."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from methods._layers import adapted, base, count, disturbed, expression_of, linear
from methods._peft import DTYPES, HOSTS, assert_parity, twins
from peft import OFTConfig
from torch import Tensor

import rankfold as rf
from rankfold.errors import InvalidOption


def layout(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    yield "skew", layer.oft_R["default"].weight, torch.Tensor.clone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_pefts(dtype: torch.dtype) -> None:
    config = OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False)
    method = rf.Recipe(("oft", {"block_size": 4}))
    assert_parity(twins(HOSTS["perceptron"], dtype, method, config, layout))


def changed(out: int = 10, columns: int = 8) -> tuple[Tensor, Tensor]:
    model = disturbed(adapted(rf.Recipe(("oft", {"block_size": 4})), linear(out, columns)), size=1.0)
    return base(model), expression_of(model).dense().detach()


def test_the_gram_matrix_of_the_rows_and_the_singular_values_are_kept_however_far_it_moves() -> None:
    before, after = changed()
    torch.testing.assert_close(after @ after.T, before @ before.T)
    torch.testing.assert_close(torch.linalg.svdvals(after), torch.linalg.svdvals(before))
    assert not torch.allclose(after.T @ after, before.T @ before, atol=1e-2)


def test_what_multiplies_the_weight_is_block_diagonal() -> None:
    before, after = changed()  # of full column rank
    rotation = torch.linalg.pinv(before) @ after
    assert rotation[:4, 4:].abs().max() < 1e-12
    assert rotation[4:, :4].abs().max() < 1e-12
    assert (rotation[:4, :4] - torch.eye(4)).abs().max() > 0.1


@pytest.mark.parametrize(("columns", "size"), [(8, 8), (12, 12), (40, 20), (64, 32)])
def test_the_block_is_the_largest_divisor_and_the_count_follows(columns: int, size: int) -> None:
    assert count(adapted("oft", linear(4, columns))) == columns * (size - 1) // 2


def test_inputs_that_no_block_divides_are_refused() -> None:
    with pytest.raises(InvalidOption, match="oft cannot cut 37 inputs into blocks of 2 to 32"):
        adapted("oft", linear(4, 37))
