"""QR-LoRA: coefficients of the terms of a pivoted QR decomposition train."""

import pytest
import scipy.linalg
import torch
from methods._layers import adapted, backward, base, change, count, leaves_of, linear, normal, sgd_step
from torch import nn


def _with_ones(model: nn.Module) -> nn.Module:
    leaves_of(model)["coefficients"].data.fill_(1)
    return model


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_coefficients_of_one_give_the_projection_on_the_leading_columns(shape: tuple[int, int]) -> None:
    for rank in (3, 6):
        model = _with_ones(adapted("qr-lora", linear(*shape), rank=rank))
        assert count(model) == rank
        basis, _, _ = scipy.linalg.qr(base(model).numpy(), pivoting=True, mode="economic")
        leading = torch.from_numpy(basis[:, :rank])
        torch.testing.assert_close(change(model), leading @ leading.T @ base(model))
    torch.testing.assert_close(change(model), base(model))


def test_the_terms_act_on_the_inputs_in_their_own_order() -> None:
    model = _with_ones(adapted("qr-lora", rank=4))
    left, (_, triangle, columns) = (
        leaves_of(model)["left"],
        scipy.linalg.qr(base(model).numpy(), pivoting=True),
    )
    inside = (left.T @ change(model))[:, columns]
    torch.testing.assert_close(inside, torch.triu(inside))
    torch.testing.assert_close(inside.abs(), torch.from_numpy(triangle[:4]).abs())


def test_a_step_moves_each_coefficient_by_the_gradient_along_its_term() -> None:
    model = adapted("qr-lora", rank=3)
    leaves = leaves_of(model)
    dense = backward(model, normal(5, 8))
    sgd_step(model, 0.1)
    along = torch.diagonal(leaves["left"].T @ dense @ leaves["right"].T)
    torch.testing.assert_close(leaves["coefficients"].detach(), -0.1 * along)
