"""The skeleton basis: columns and rows of the weight, and the best core between them."""

import pytest
import torch
from methods._frames import basis_of, decaying, excess, holding, of_rank, product
from methods._layers import adapted, backward, change, leaves_of, normal, rank_of, sgd_step
from torch import Tensor

from rankfold.errors import InvalidOption

SELECTIONS = ["pivoted", "leverage", "norms", "random"]


def indices(lines: Tensor, matrix: Tensor) -> list[int]:
    """Return which rows of a matrix these are, bit for bit."""
    return [next(i for i, row in enumerate(matrix) if torch.equal(row, line)) for line in lines]


@pytest.mark.parametrize("select", SELECTIONS)
def test_left_and_right_are_different_columns_and_rows_of_the_weight_bit_for_bit(select: str) -> None:
    matrix = normal(6, 8)
    basis = basis_of(matrix, "skeleton", 3, select=select)
    assert len(set(indices(basis.left.T, matrix.T))) == len(set(indices(basis.right, matrix))) == 3


@pytest.mark.parametrize("select", SELECTIONS)
def test_no_other_core_errs_less(select: str) -> None:
    matrix = normal(6, 8)
    basis = basis_of(matrix, "skeleton", 3, select=select)
    rest = matrix - product(basis)
    assert (basis.left.T @ rest @ basis.right.T).abs().max() < 1e-10


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_matrix_of_lower_rank_is_its_own_approximation(select: str) -> None:
    matrix = of_rank(10, 12, 3)
    torch.testing.assert_close(product(basis_of(matrix, "skeleton", 4, select=select)), matrix)


@pytest.mark.parametrize("seed", range(3))
def test_with_pivots_the_error_is_a_small_multiple_of_the_best_one(seed: int) -> None:
    for matrix in (normal(30, 40, seed=seed), decaying(30, 40, seed=seed)):
        spectral, frobenius = excess(basis_of(matrix, "skeleton", 6), matrix)
        assert 1 <= spectral < 3
        assert 1 <= frobenius < 2
        assert frobenius <= excess(basis_of(matrix, "nystrom", 6, select="pivoted"), matrix)[1]


def test_the_selections_are_what_they_say() -> None:
    matrix = decaying(12, 10)
    matrix[7] *= 5
    norms = basis_of(matrix, "skeleton", 2, select="norms")
    assert indices(norms.right, matrix) == matrix.norm(dim=1).topk(2).indices.tolist()
    assert indices(norms.left.T, matrix.T) == matrix.norm(dim=0).topk(2).indices.tolist()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    leverage = basis_of(matrix, "skeleton", 2, select="leverage")
    assert indices(leverage.right, matrix) == left[:, :2].square().sum(1).topk(2).indices.tolist()
    assert indices(leverage.left.T, matrix.T) == right[:2].square().sum(0).topk(2).indices.tolist()
    drawn = [
        indices(basis_of(matrix, "skeleton", 4, select="random", seed=s).right, matrix) for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("structure", ["lora", "dora", "gralora"])
def test_as_factors_it_starts_at_the_base(structure: str) -> None:
    matrix = normal(8, 8)
    model = adapted(f"{structure}/skeleton", holding(matrix), rank=4, alpha=12)
    torch.testing.assert_close(model(normal(5, 8)), normal(5, 8) @ matrix.T + model[0].bias)


def test_as_a_frame_the_change_stays_between_the_columns_and_the_rows() -> None:
    model = adapted("lora-xs/skeleton", holding(normal(10, 12)), rank=3)
    for _ in range(3):
        backward(model, normal(5, 12))
        sgd_step(model, 0.1)
    leaves, moved = leaves_of(model), change(model)
    left, right = (torch.linalg.pinv(leaves[name]) for name in ("left", "right"))
    torch.testing.assert_close(leaves["left"] @ left @ moved @ right @ leaves["right"], moved)
    assert rank_of(moved) == 3


def test_another_selection_is_refused() -> None:
    with pytest.raises(
        InvalidOption, match="select must be one of pivoted, leverage, norms, random, not 'deim'"
    ):
        basis_of(normal(6, 8), "skeleton", 3, select="deim")
