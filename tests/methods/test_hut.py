"""HUT: the weight times a low-rank matrix that starts at ones."""

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    count,
    disturbed,
    expression_of,
    leaves_of,
    linear,
    normal,
)

import rankfold as rf
from rankfold.weights import Modulated


@pytest.mark.parametrize("rank", [1, 3])
def test_the_start_is_the_base_and_both_factors_have_a_gradient(rank: int) -> None:
    model, x = adapted("hut", rank=rank), normal(5, 8)
    torch.testing.assert_close(model(x), linear()(x))
    met = backward(model, x) * base(model)
    leaves = leaves_of(model)
    up, down = leaves["up"].detach().view(6, rank), leaves["down"].detach().view(rank, 8)
    torch.testing.assert_close(leaves["up"].grad.view(6, rank), met @ down.T)
    torch.testing.assert_close(leaves["down"].grad.view(rank, 8), up.T @ met)
    assert met.any()


@pytest.mark.parametrize("rank", [1, 3])
def test_the_weight_is_multiplied_by_the_product(rank: int) -> None:
    model = disturbed(adapted("hut", rank=rank))
    leaves = leaves_of(model)
    product = leaves["up"].detach().view(6, rank) @ leaves["down"].detach().view(rank, 8)
    torch.testing.assert_close(expression_of(model).dense().detach(), base(model) * product)
    assert count(model) == rank * (6 + 8)


def test_rank_one_forms_no_matrix_and_costs_in_plus_out_a_token() -> None:
    expression = expression_of(adapted("hut", rank=1))
    assert expression.macs(5) == 5 * (6 * 8 + 6 + 8)


def test_the_residual_form_is_hiras() -> None:
    model = disturbed(adapted(rf.Recipe("hut", "kaiming"), rank=2))
    other = disturbed(adapted("hira", rank=2))
    assert isinstance(expression_of(model), Modulated)
    torch.testing.assert_close(expression_of(model).dense(), expression_of(other).dense())
