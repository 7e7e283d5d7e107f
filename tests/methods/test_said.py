"""SAID: one random subspace of all weights, with a scale for every layer, d numbers in all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from methods._subspace import INPUTS, PATHS, WANTED, loss_of, perceptron, projection_of, train, weights_of

import rankfold as rf
from rankfold.errors import InvalidOption


def adapted(dimension: int = 15) -> torch.nn.Module:
    return rf.adapt(perceptron(), "said", dimension=dimension)


@pytest.mark.parametrize("dimension", [4, 15, 100])
def test_exactly_d_numbers_train(dimension: int) -> None:
    model = adapted(dimension)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == dimension
    assert rf.count(model).active == dimension


def test_at_first_the_output_is_the_models_and_the_scales_have_no_gradient() -> None:
    model, plain = adapted(), perceptron()
    assert torch.equal(model(INPUTS), plain(INPUTS))
    loss_of(model).backward()
    weights = [plain.get_submodule(path).weight for path in PATHS]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(plain), weights)])
    for path in PATHS:
        assert not model.get_submodule(path).expression.leaf("scale").value.grad.any()
    theta = model.get_parameter("rankfold_default_theta")
    torch.testing.assert_close(theta.grad, projection_of(model).dense().T @ gradient)


def test_a_weight_moves_by_its_scale_times_its_part_of_the_projection() -> None:
    model = adapted()
    scales, theta = (0.5, -2.0, 3.0), torch.arange(12).double()
    with torch.no_grad():
        model.get_parameter("rankfold_default_theta").copy_(theta)
        for path, scale in zip(PATHS, scales, strict=True):
            model.get_submodule(path).expression.leaf("scale").value.fill_(scale)
    parts = (projection_of(model).dense() @ theta).split([54, 63, 35])
    wanted = torch.cat([scale * part for scale, part in zip(scales, parts, strict=True)])
    torch.testing.assert_close(weights_of(model) - weights_of(perceptron()), wanted)


def test_with_the_scales_left_at_one_it_is_the_plain_subspace_of_what_they_leave() -> None:
    model = adapted(15)
    plain = rf.adapt(perceptron(), "intrinsic-dimension", dimension=12)
    for path in PATHS:
        model.get_submodule(path).expression.leaf("scale").value.requires_grad_(False)
    train(model, 6)
    train(plain, 6)
    assert torch.equal(weights_of(model), weights_of(plain))


def test_the_scales_learn_once_the_vector_has_moved() -> None:
    model = adapted()
    train(model, 3)
    scales = [model.get_submodule(path).expression.leaf("scale").value.item() for path in PATHS]
    assert all(scale != 1 for scale in scales)
    assert F.mse_loss(model(INPUTS), WANTED) < F.mse_loss(perceptron()(INPUTS), WANTED)


def test_fewer_dimensions_than_scales_are_refused() -> None:
    with pytest.raises(InvalidOption, match=r"said: dimension 3 leaves nothing .* choose at least 4"):
        adapted(3)
