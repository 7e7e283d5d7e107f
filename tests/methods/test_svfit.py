"""SVFit: the leading singular values train."""

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    count,
    disturbed,
    linear,
    normal,
    rank_of,
    sgd_step,
)  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_the_change_is_diagonal_in_the_leading_singular_bases(shape: tuple[int, int]) -> None:
    model = disturbed(adapted("svfit", linear(*shape), rank=3))
    left, _, right = torch.linalg.svd(base(model), full_matrices=False)
    inside = left.T @ change(model) @ right.T
    diagonal = torch.diagonal(inside)
    assert diagonal[:3].abs().min() > 1e-3
    torch.testing.assert_close(inside, torch.diag(diagonal * (torch.arange(6) < 3)))


def test_a_step_is_the_gradient_projected_on_the_pairs_of_singular_vectors() -> None:
    model = adapted("svfit", rank=3)
    x = normal(5, 8)
    assert torch.equal(model(x), linear()(x))
    left, _, right = torch.linalg.svd(base(model), full_matrices=False)
    dense = backward(model, x)
    sgd_step(model, 0.1)
    along = torch.diagonal(left.T @ dense @ right.T)[:3]
    torch.testing.assert_close(change(model), -0.1 * left[:, :3] * along @ right[:3])


def test_all_values_give_a_change_of_full_rank_for_as_many_numbers() -> None:
    model = disturbed(adapted("svfit", rank=6))
    assert count(model) == 6
    assert rank_of(change(model)) == 6


def test_weight_decay_pulls_towards_the_base() -> None:
    model = disturbed(adapted("svfit", rank=3))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 0
    assert not change(model).any()
