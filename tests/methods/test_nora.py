"""NoRA: a small LoRA between frozen singular bases."""

import pytest
import torch
from methods._layers import adapted, base, change, count, disturbed, leaves_of, linear, rank_of

from rankfold.errors import InvalidOption


@pytest.mark.parametrize("shape", [(10, 12), (30, 20)])
def test_the_trained_count_does_not_depend_on_the_layer(shape: tuple[int, int]) -> None:
    assert count(adapted("nora", linear(*shape), rank=2, outer_rank=5)) == 2 * 5 * 2


@pytest.mark.parametrize("split", ["sqrt", "left", "right", "none"])
def test_the_change_stays_between_the_leading_singular_bases_at_the_inner_rank(split: str) -> None:
    model = disturbed(adapted("nora", linear(10, 12), rank=2, outer_rank=5, split=split))
    left, _, right = torch.linalg.svd(base(model), full_matrices=False)
    moved = change(model)
    assert rank_of(moved) == 2
    torch.testing.assert_close(left[:, :5] @ left[:, :5].T @ moved @ right[:5].T @ right[:5], moved)


@pytest.mark.parametrize(("split", "powers"), [("sqrt", (0.5, 0.5)), ("left", (1, 0)), ("right", (0, 1))])
def test_the_singular_values_stand_where_they_are_asked_to(split: str, powers: tuple[float, float]) -> None:
    leaves = leaves_of(model := adapted("nora", rank=2, outer_rank=5, split=split))
    values = torch.linalg.svdvals(base(model))[:5]
    torch.testing.assert_close(leaves["left"].norm(dim=0), values ** powers[0])
    torch.testing.assert_close(leaves["right"].norm(dim=1), values ** powers[1])


def test_an_inner_rank_above_the_outer_one_and_an_unknown_split_are_refused() -> None:
    with pytest.raises(InvalidOption, match="raise outer_rank or lower rank"):
        adapted("nora", rank=4, outer_rank=3)
    with pytest.raises(InvalidOption, match="sqrt"):
        adapted("nora", rank=2, split="cube")
