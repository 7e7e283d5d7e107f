"""The leading singular triplets as a frozen frame."""

import pytest
import torch
from methods._layers import adapted, base, leaves_of, linear, trained

import rankfold as rf
from rankfold.errors import InvalidOption


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_the_frame_is_orthonormal_and_nothing_approximates_the_weight_better(shape: tuple[int, int]) -> None:
    model = adapted("svfit", linear(*shape), rank=4)
    leaves, matrix = leaves_of(model), base(model)
    left, right = leaves["left"], leaves["right"]
    torch.testing.assert_close(left.T @ left, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(right @ right.T, torch.eye(4, dtype=torch.float64))
    rest = matrix - left @ (left.T @ matrix @ right.T) @ right
    torch.testing.assert_close(rest.norm(), torch.linalg.svdvals(matrix)[4:].norm())


def test_the_frame_is_frozen() -> None:
    assert [name for name in trained(adapted("svfit", rank=4)) if "left" in name or "right" in name] == []


def test_a_randomised_frame_is_repeated_by_its_seed() -> None:
    recipe = rf.Recipe("svfit", ("svd", {"iterations": 0}))
    first, again, other = (
        leaves_of(adapted(recipe, linear(40, 50), rank=4, seed=s))["left"] for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_negative_count_of_iterations_is_refused() -> None:
    with pytest.raises(InvalidOption, match="iterations must be at least 0"):
        adapted(rf.Recipe("svfit", ("svd", {"iterations": -1})), rank=2)
