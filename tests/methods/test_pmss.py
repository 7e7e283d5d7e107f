"""PMSS: a small core between columns and rows of the weight."""

import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    count,
    disturbed,
    leaves_of,
    linear,
    normal,
    rank_of,
    sgd_step,
)  # fmt: skip
from torch import Tensor

import rankfold as rf


def _lines(model: torch.nn.Module) -> tuple[list[int], list[int]]:
    """Return which columns and which rows of the weight the frozen factors are, bit for bit."""

    def found(lines: Tensor, among: Tensor) -> list[int]:
        return [next(i for i, other in enumerate(among) if torch.equal(line, other)) for line in lines]

    leaves = leaves_of(model)
    return found(leaves["left"].T, base(model).T), found(leaves["right"], base(model))


def test_the_factors_are_columns_and_rows_of_the_weight_before_and_after_training() -> None:
    for select in ("pivoted", "norms", "leverage", "random"):
        model = adapted(rf.Recipe("pmss", init=("skeleton", {"select": select})), rank=4)
        before = _lines(model)
        assert all(len(set(lines)) == 4 for lines in before)
        backward(model, normal(5, 8))
        sgd_step(model, 0.1)
        assert _lines(disturbed(model)) == before


def test_the_change_reaches_the_rank_of_the_core_for_its_square_of_numbers() -> None:
    model = disturbed(adapted("pmss", linear(20, 30), rank=5))
    assert count(model) == 25
    assert rank_of(change(model)) == 5


def test_a_step_moves_the_core_by_the_gradient_between_the_lines() -> None:
    model = adapted("pmss", rank=3, alpha=6)
    leaves = leaves_of(model)
    dense = backward(model, normal(5, 8))
    sgd_step(model, 0.1)
    expected = -0.1 * 2 * leaves["left"].T @ dense @ leaves["right"].T
    torch.testing.assert_close(leaves["core"].detach(), expected)
