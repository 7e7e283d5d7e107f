"""SALT: the top of the spectrum is scaled and shifted, the tail takes a low-rank matrix."""

from pathlib import Path

import pytest
import torch
from methods._dynamic import Training, perceptron, resumes
from methods._layers import (
    adapted,
    base,
    change,
    count,
    disturbed,
    leaves_of,
    linear,
    normal,
    rank_of,
    trained,
)
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.spectral_penalty import penalty


def _inside(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the change in the frozen singular bases, and the singular values."""
    leaves = leaves_of(model)
    left, right = (torch.cat([leaves[k], leaves[f"rest.{k}"]], dim) for k, dim in (("left", 1), ("right", 0)))
    return left.T @ change(model) @ right.T, torch.linalg.svdvals(base(model))


@pytest.mark.parametrize("shape", [(10, 12), (12, 10)])
def test_without_a_rectifier_the_change_is_a_diagonal_block_and_a_low_rank_one(
    shape: tuple[int, int],
) -> None:
    model = disturbed(adapted("salt", linear(*shape), rank=2, relu="none", ratio=0.4))
    assert count(model) == 2 * 4 + 2 * 2 * 6
    inside, values = _inside(model)
    leaves = leaves_of(model)
    top = leaves["scale"] * values[:4] + leaves["shift"]
    torch.testing.assert_close(inside[:4, :4], torch.diag(top.detach()))
    assert rank_of(inside[4:, 4:]) == 2
    assert max(inside[:4, 4:].abs().max(), inside[4:, :4].abs().max()) < 1e-12


def test_with_a_rectifier_no_entry_of_the_core_is_negative_and_the_tail_has_a_higher_rank() -> None:
    model = disturbed(adapted("salt", linear(10, 12), rank=2, ratio=0.4), 2)
    leaves = leaves_of(model)
    leaves["shift"].data[1] = -5
    inside, values = _inside(model)
    top = (1 + leaves["scale"]) * values[:4] + leaves["shift"]
    assert top.min() < 0 < top.max()
    tail = torch.diag(values[4:]) + leaves["up"] @ leaves["down"]
    expected = torch.block_diag(torch.diag(top), tail).clamp_min(0) - torch.diag(values)
    torch.testing.assert_close(inside, expected.detach())
    assert rank_of(inside[4:, 4:]) > 2


def test_a_rectifier_of_the_diagonal_leaves_the_entries_beside_it() -> None:
    model = disturbed(adapted("salt", linear(10, 12), rank=2, ratio=0.4, relu="diagonal"), 2)
    leaves = leaves_of(model)
    inside, values = _inside(model)
    tail = torch.diag(values[4:]) + leaves["up"] @ leaves["down"]
    diagonal = torch.diagonal(tail)
    assert diagonal.min() < 0
    expected = tail - torch.diag(diagonal.clamp_max(0)) - torch.diag(values[4:])
    torch.testing.assert_close(inside[4:, 4:], expected.detach())


@pytest.mark.parametrize("relu", ["all", "diagonal", "none"])
def test_the_start_is_the_base_and_the_penalty_nothing(relu: str) -> None:
    model = adapted("salt", rank=2, relu=relu)
    x = normal(5, 8)
    assert torch.equal(model(x), linear()(x))
    value = penalty(model)
    value.backward()
    assert value == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_penalty_is_the_size_of_the_two_changes_before_the_rectifier() -> None:
    model = disturbed(adapted("salt", linear(10, 12), rank=2, relu="none"))
    inside, _ = _inside(model)
    torch.testing.assert_close(penalty(model).detach(), inside[:5, :5].norm() + inside[5:, 5:].norm())


def test_a_share_of_one_has_no_tail_and_shares_outside_are_refused() -> None:
    model = rf.fold(disturbed(adapted("salt", rank=2, ratio=1.0)))
    assert model(normal(5, 8)).isfinite().all()
    for ratio in (0.0, 1.5):
        with pytest.raises(InvalidOption, match="ratio"):
            adapted("salt", rank=2, ratio=ratio)
    with pytest.raises(InvalidOption, match="relu"):
        adapted("salt", rank=2, relu="some")


def test_the_gradient_of_the_penalty_is_added_to_that_of_the_loss() -> None:
    training = Training(rf.Recipe(("salt", {"mu": 0.3})), 20)
    disturbed(training.model)
    training.backward()
    parameters = trained(training.model)
    plain = {name: p.grad.clone() for name, p in parameters.items()}
    slopes = torch.autograd.grad(0.3 * penalty(training.model), list(parameters.values()))
    training.run  # noqa: B018 - lets the penalty act as the one under way
    training.handle.methods["structure=salt"].gradients_ready(training.run)
    for (name, parameter), slope in zip(parameters.items(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, plain[name] + slope)


def test_a_penalty_keeps_the_change_smaller_and_none_needs_no_attaching() -> None:
    sizes = []
    for mu in (0.0, 0.5):
        training = Training(rf.Recipe(("salt", {"mu": mu})), 30)
        training.step(30)
        sizes.append(penalty(training.model).item())
    assert sizes[1] < 0.5 * sizes[0]
    assert not Training("salt").handle.methods
    with pytest.raises(InvalidOption, match="mu"):
        rf.adapt(perceptron(), rf.Recipe(("salt", {"mu": -1.0})), rank=2, targets=["0"])


def test_a_training_with_a_penalty_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    resumes(rf.Recipe(("salt", {"mu": 0.1})), tmp_path)
