"""DiaBlo: the diagonal blocks of the weight train directly."""

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
    leaves_of,
    linear,
    normal,
    rank_of,
    sgd_step,
)  # fmt: skip
from torch import Tensor

import rankfold as rf
from rankfold.errors import InvalidOption


def mask(out: int, columns: int, height: int, width: int) -> Tensor:
    """Where the diagonal blocks are."""
    rows, places = torch.arange(out)[:, None] // height, torch.arange(columns) // width
    return rows == places


@pytest.mark.parametrize(
    ("shape", "blocks", "size"), [((6, 8), 2, (3, 4)), ((5, 7), 3, (2, 3)), ((9, 4), 4, (3, 1))]
)
def test_a_step_moves_the_weight_by_the_diagonal_blocks_of_the_gradient(
    shape: tuple[int, int], blocks: int, size: tuple[int, int]
) -> None:
    model, x = adapted("diablo", linear(*shape), blocks=blocks), normal(5, shape[1])
    assert torch.equal(model(x), linear(*shape)(x))
    dense = backward(model, x)
    sgd_step(model, 0.1)
    torch.testing.assert_close(change(model), -0.1 * dense * mask(*shape, *size))


def test_full_rank_at_a_sixth_of_the_numbers() -> None:
    model = disturbed(adapted("diablo", linear(48, 60), blocks=6))
    assert count(model) == 480 == 48 * 60 // 6
    assert rank_of(change(model)) == 48


def test_no_more_blocks_than_the_sides_can_be_cut_into() -> None:
    # ceil(out / 64) and ceil(in / 64) are 1, so 8 blocks of one entry.
    assert leaves_of(adapted("diablo"))["blocks"].shape == (8, 1, 1)


def test_off_the_diagonal_the_folded_weight_is_the_base_bit_for_bit() -> None:
    model = disturbed(adapted("diablo", blocks=2))
    before = base(model).clone()
    after = rf.fold(model)[0].weight
    outside = ~mask(6, 8, 3, 4)
    assert torch.equal(after[outside], before[outside])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("options", [{"blocks": 0}, {"dropout": 1.0}, {"blocks": 2.0}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="diablo"):
        adapted("diablo", **options)
