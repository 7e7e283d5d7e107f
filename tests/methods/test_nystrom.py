"""The Nyström basis: columns and rows of the weight, and the inverse of what they share."""

from pathlib import Path

import pytest
import torch
from methods._calibrated import assert_reloads
from methods._frames import basis_of, decaying, excess, holding, of_rank, product
from methods._layers import adapted, backward, change, disturbed, leaves_of, normal, rank_of, sgd_step

from rankfold.errors import InvalidOption


def test_left_and_right_are_columns_and_rows_of_the_weight_bit_for_bit() -> None:
    matrix = normal(6, 8)
    basis = basis_of(matrix, "nystrom", 3)
    assert torch.equal(basis.left, matrix[:, :3])
    assert torch.equal(basis.right, matrix[:3])
    torch.testing.assert_close(basis.middle, torch.linalg.inv(matrix[:3, :3]))
    assert torch.equal(basis.values, torch.ones(3).double())


def test_it_is_exact_on_the_first_rows_and_columns_and_errs_by_the_schur_complement() -> None:
    matrix = normal(6, 8)
    rest = matrix - product(basis_of(matrix, "nystrom", 3))
    torch.testing.assert_close(rest[:3], torch.zeros(3, 8).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(rest[:, :3], torch.zeros(6, 3).double(), atol=1e-12, rtol=0)
    schur = matrix[3:, 3:] - matrix[3:, :3] @ torch.linalg.inv(matrix[:3, :3]) @ matrix[:3, 3:]
    torch.testing.assert_close(rest[3:, 3:], schur)
    assert schur.norm() > 0.1


@pytest.mark.parametrize("select", ["leading", "pivoted"])
@pytest.mark.parametrize("rank", [3, 5])
def test_a_matrix_of_lower_rank_is_its_own_approximation(select: str, rank: int) -> None:
    matrix = of_rank(10, 12, 3)
    torch.testing.assert_close(product(basis_of(matrix, "nystrom", rank, select=select)), matrix)


@pytest.mark.parametrize("seed", range(3))
def test_with_pivots_the_error_is_a_small_multiple_of_the_best_one(seed: int) -> None:
    for matrix in (normal(30, 40, seed=seed), decaying(30, 40, seed=seed)):
        spectral, frobenius = excess(basis_of(matrix, "nystrom", 6, select="pivoted"), matrix)
        assert 1 <= spectral < 5
        assert 1 <= frobenius < 3


@pytest.mark.parametrize("structure", ["lora", "dora", "gralora"])
def test_as_factors_it_starts_at_the_base(structure: str) -> None:
    matrix = normal(8, 8)
    model = adapted(f"{structure}/nystrom", holding(matrix), rank=4, alpha=12)
    torch.testing.assert_close(model(normal(5, 8)), normal(5, 8) @ matrix.T + model[0].bias)


def test_the_factors_are_balanced_and_hold_the_approximation_whatever_the_scaling() -> None:
    matrix = normal(8, 10)
    leaves = leaves_of(adapted("lora/nystrom", holding(matrix), rank=4, alpha=12))
    up, down = leaves["up"], leaves["down"]
    torch.testing.assert_close(3 * up @ down, product(basis_of(matrix, "nystrom", 4)))
    torch.testing.assert_close(up.T @ up, down @ down.T)


def test_as_a_frame_the_outer_factors_stay_slices_of_the_weight_through_training() -> None:
    matrix = normal(6, 8)
    model = disturbed(adapted("lora-xs/nystrom", holding(matrix), rank=2))
    backward(model, normal(5, 8))
    sgd_step(model, 0.1)
    leaves = leaves_of(model)
    assert torch.equal(leaves["left"], matrix[:, :2])
    assert torch.equal(leaves["right"], matrix[:2])
    assert rank_of(change(model)) == 2


def test_the_adapter_loads(tmp_path: Path) -> None:
    plain = normal(6, 8)
    assert_reloads(adapted("lora/nystrom", holding(plain), rank=3), holding(plain), normal(5, 8), tmp_path)


def test_another_selection_is_refused() -> None:
    with pytest.raises(InvalidOption, match="select must be leading or pivoted, not 'norms'"):
        basis_of(normal(6, 8), "nystrom", 3, select="norms")
