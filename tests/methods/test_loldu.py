"""LoLDU: the leading pivots of the weight train."""

import pytest
import torch
from methods._layers import adapted, base, change, count, disturbed, leaves_of, linear, normal

import rankfold as rf


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_leading_minors_of_the_change_are_products_of_the_offsets(shape: tuple[int, int]) -> None:
    model = disturbed(adapted("loldu", linear(*shape), rank=4))
    permutation, lower, upper = torch.linalg.lu(base(model))
    inside = permutation.T @ change(model) * 4  # alpha = 1, so the scaling is 1 / 4
    offset = leaves_of(model)["offset"].detach()
    for size in range(1, 5):
        minor = torch.linalg.det(inside[:size, :size])
        torch.testing.assert_close(minor, offset[:size].prod())
    torch.testing.assert_close(inside[0], offset[0] * upper[0] / upper[0, 0])
    torch.testing.assert_close(inside[:, 0], offset[0] * lower[:, 0])


def test_taking_all_pivots_away_leaves_nothing_of_the_weight() -> None:
    model = adapted("loldu", rank=6, alpha=6)
    assert count(model) == 6
    _, _, upper = torch.linalg.lu(base(model))
    leaves_of(model)["offset"].data.copy_(-torch.diagonal(upper))
    torch.testing.assert_close(change(model), -base(model))


def test_a_weight_with_rows_of_zeros_has_no_infinite_factor() -> None:
    model = linear(6, 8, rank=2)
    model[0].weight.data[3:] = 0
    disturbed(adapted("loldu", model, rank=6))
    assert model(normal(5, 8)).isfinite().all()


def test_another_initialiser_takes_other_pivots() -> None:
    model = disturbed(adapted(rf.Recipe("loldu", init=("lu", {"pivoting": "complete"})), rank=1, alpha=1))
    row, column = divmod(int(base(model).abs().argmax()), 8)
    assert change(model).abs().max() == change(model)[row, column].abs()
