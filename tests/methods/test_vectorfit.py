"""VectorFit: all singular values train."""

import pytest
import torch
from methods._layers import adapted, base, change, count, disturbed, leaves_of, linear, normal, rank_of


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_the_change_is_diagonal_in_all_singular_bases_and_of_full_rank(shape: tuple[int, int]) -> None:
    model = disturbed(adapted("vectorfit", linear(*shape)))
    assert count(model) == 6
    left, _, right = torch.linalg.svd(base(model), full_matrices=False)
    inside = left.T @ change(model) @ right.T
    torch.testing.assert_close(inside, torch.diag(torch.diagonal(inside)))
    assert rank_of(change(model)) == 6


def test_the_singular_values_are_scaled_to_any_others_exactly() -> None:
    model = adapted("vectorfit")
    left, values, right = torch.linalg.svd(base(model), full_matrices=False)
    factors = normal(6).abs()
    leaves_of(model)["offset"].data.copy_(values * (factors - 1))
    x = normal(5, 8)
    torch.testing.assert_close(model(x), x @ (left * values * factors @ right).T + linear()[0].bias)
