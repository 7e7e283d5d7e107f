"""The basis of the pivoted LDU decomposition."""

import pytest
import torch
from methods._frames import basis_of, decaying, excess, holding, of_rank, product
from methods._layers import adapted, leaves_of, normal

from rankfold.errors import InvalidOption


def test_with_row_pivots_it_is_the_decomposition_that_torch_has() -> None:
    matrix = normal(8, 6)
    permutation, lower, upper = torch.linalg.lu(matrix)
    basis = basis_of(matrix, "lu", 4, pivoting="rows")
    torch.testing.assert_close(basis.left, (permutation @ lower)[:, :4])
    torch.testing.assert_close(basis.values, upper.diagonal()[:4])
    torch.testing.assert_close(basis.values[:, None] * basis.right, upper[:4])


def test_changes_of_the_values_show_in_the_leading_minors() -> None:
    # L and U have unit diagonals in the order of the pivots, so minors are products of the changes.
    matrix, changes = normal(6, 6), torch.tensor([0.5, -2.0, 3.0]).double()
    permutation = torch.linalg.lu(matrix)[0]
    basis = basis_of(matrix, "lu", 3, pivoting="rows")
    moved = permutation.T @ (basis.left * changes @ basis.right)
    for size in (1, 2, 3):
        torch.testing.assert_close(torch.linalg.det(moved[:size, :size]), changes[:size].prod())


def test_with_complete_pivots_no_entry_exceeds_one_and_the_first_pivot_is_the_largest_entry() -> None:
    matrix = normal(8, 10)
    basis = basis_of(matrix, "lu", 5)
    assert basis.left.abs().max() <= 1 + 1e-12
    assert basis.right.abs().max() <= 1 + 1e-12
    assert basis.values[0].abs() == matrix.abs().max()


@pytest.mark.parametrize("pivoting", ["complete", "rows"])
def test_the_pivot_rows_and_columns_are_held_exactly(pivoting: str) -> None:
    matrix = normal(8, 10)
    rest = (matrix - product(basis_of(matrix, "lu", 3, pivoting=pivoting))).abs() < 1e-12
    assert int(rest.all(0).sum()) == 3
    assert int(rest.all(1).sum()) == 3


@pytest.mark.parametrize("pivoting", ["complete", "rows"])
@pytest.mark.parametrize("rank", [3, 5])
def test_a_matrix_of_lower_rank_is_its_own_approximation(pivoting: str, rank: int) -> None:
    matrix = of_rank(10, 12, 3)
    basis = basis_of(matrix, "lu", rank, pivoting=pivoting)
    torch.testing.assert_close(product(basis), matrix)


@pytest.mark.parametrize("seed", range(3))
def test_with_complete_pivots_the_error_is_a_small_multiple_of_the_best_one(seed: int) -> None:
    for matrix in (normal(30, 40, seed=seed), decaying(30, 40, seed=seed)):
        spectral, frobenius = excess(basis_of(matrix, "lu", 6), matrix)
        assert 1 <= spectral < 4
        assert 1 <= frobenius < 2.5


@pytest.mark.parametrize("structure", ["lora", "dora", "gralora"])
def test_as_factors_it_starts_at_the_base_with_pivots_of_either_sign(structure: str) -> None:
    matrix = normal(8, 8)
    assert (basis_of(matrix, "lu", 4).values < 0).any()
    model = adapted(f"{structure}/lu", holding(matrix), rank=4, alpha=12)
    torch.testing.assert_close(model(normal(5, 8)), normal(5, 8) @ matrix.T + model[0].bias)
    if structure == "lora":
        leaves = leaves_of(model)
        torch.testing.assert_close(3 * leaves["up"] @ leaves["down"], product(basis_of(matrix, "lu", 4)))


def test_another_pivoting_is_refused() -> None:
    with pytest.raises(InvalidOption, match="pivoting must be complete or rows, not 'columns'"):
        basis_of(normal(6, 8), "lu", 3, pivoting="columns")
