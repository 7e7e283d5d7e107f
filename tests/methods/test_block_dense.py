"""BlockDense: a block-diagonal factor and a dense one."""

import pytest
import torch
from methods._layers import expression_of, leaves_of, linear, normal, rank_of

import rankfold as rf
from rankfold.errors import RankfoldError


def layer(out: int = 8, columns: int = 12, rank: int = 4, blocks: int = 2) -> torch.nn.Module:
    return rf.adapt(linear(out, columns), rf.Recipe(("block-dense", {"blocks": blocks})), rank=rank)


def test_it_is_the_dense_factor_on_the_blocks() -> None:
    model, x = layer(), normal(5, 12)
    leaves = leaves_of(model)
    first = torch.cat([x[:, :6] @ leaves["down"][0].T, x[:, 6:] @ leaves["down"][1].T], 1)
    torch.testing.assert_close(model(x), first @ leaves["up"].T + model[0].bias)


def test_it_has_rank_r_from_r_in_over_b_numbers_on_the_input_side() -> None:
    model = layer(24, 24, rank=12, blocks=3)
    assert rank_of(expression_of(model).dense().detach()) == 12
    assert leaves_of(model)["down"].numel() == 12 * 24 // 3
    assert leaves_of(model)["up"].numel() == 24 * 12
    assert expression_of(model).macs(7) == 7 * (12 * 24 // 3 + 24 * 12)


def test_the_blocks_are_not_filled_with_zeros_to_be_applied() -> None:
    weight = expression_of(layer())
    assert weight.small_rank() is None
    assert weight.factored() is None


def test_the_dense_factor_and_every_block_are_their_own_polar_factors() -> None:
    leaves = leaves_of(layer(9, 12, rank=6))
    for matrix in (leaves["up"], *leaves["down"]):
        values = torch.linalg.svdvals(matrix.detach())
        torch.testing.assert_close(values, torch.ones_like(values))


def test_merged_and_structured_outputs_agree() -> None:
    model, x = layer(), normal(5, 12)
    with torch.no_grad():
        structured = model(x)
    torch.testing.assert_close(rf.fold(model)(x), structured)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(RankfoldError, match="block-dense needs a layer whose 12 inputs 5 blocks divide"):
        layer(rank=5, blocks=5)
    with pytest.raises(RankfoldError, match="multiple of 2"):
        layer(rank=3)
    with pytest.raises(RankfoldError, match="blocks"):
        layer(blocks=0)
