"""The basis of the column-pivoted QR decomposition."""

from pathlib import Path

import pytest
import torch
from methods._calibrated import assert_reloads
from methods._frames import basis_of, decaying, excess, holding, of_rank, product
from methods._layers import adapted, change, expression_of, leaves_of, normal
from scipy.linalg import qr as lapack_qr


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_left_is_orthonormal_and_the_approximation_is_the_projection_on_it(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    basis = basis_of(matrix, "qr", 3)
    torch.testing.assert_close(basis.left.T @ basis.left, torch.eye(3).double())
    torch.testing.assert_close(product(basis), basis.left @ basis.left.T @ matrix)
    assert (basis.values.diff() <= 0).all()
    assert (basis.values > 0).all()


def test_the_pivot_columns_are_lapacks_and_are_held_exactly() -> None:
    matrix = normal(6, 8)
    basis = basis_of(matrix, "qr", 3)
    _, triangle, order = lapack_qr(matrix.numpy(), pivoting=True)
    pivots = torch.from_numpy(order[:3]).long()
    torch.testing.assert_close(product(basis)[:, pivots], matrix[:, pivots])
    torch.testing.assert_close(basis.values, torch.from_numpy(triangle).diagonal()[:3].abs())
    upper = basis.right[:, pivots]
    torch.testing.assert_close(upper, upper.triu())
    torch.testing.assert_close(upper.diagonal(), torch.ones(3).double())


@pytest.mark.parametrize("rank", [3, 5])
def test_a_matrix_of_lower_rank_is_its_own_approximation(rank: int) -> None:
    matrix = of_rank(10, 12, 3)
    basis = basis_of(matrix, "qr", rank)
    torch.testing.assert_close(product(basis), matrix)
    assert (basis.values[3:] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_a_small_multiple_of_the_best_one(seed: int) -> None:
    for matrix in (normal(30, 40, seed=seed), decaying(30, 40, seed=seed)):
        spectral, frobenius = excess(basis_of(matrix, "qr", 6), matrix)
        assert 1 <= spectral < 2.5
        assert 1 <= frobenius < 1.5


@pytest.mark.parametrize("structure", ["lora", "dora", "gralora"])
def test_as_factors_it_starts_at_the_base(structure: str) -> None:
    matrix = normal(8, 8)
    model = adapted(f"{structure}/qr", holding(matrix), rank=4, alpha=12)
    torch.testing.assert_close(model(normal(5, 8)), normal(5, 8) @ matrix.T + model[0].bias)


def test_the_factors_split_the_approximation_evenly_whatever_the_scaling() -> None:
    matrix = normal(8, 10)
    basis, leaves = (
        basis_of(matrix, "qr", 4),
        leaves_of(adapted("lora/qr", holding(matrix), rank=4, alpha=12)),
    )
    torch.testing.assert_close(3 * leaves["up"] @ leaves["down"], product(basis))
    torch.testing.assert_close(leaves["up"].norm(dim=0), (basis.values / 3).sqrt())


def test_as_a_frame_it_keeps_the_change_in_the_span_of_the_chosen_columns() -> None:
    model = adapted("svfit/qr", holding(normal(6, 8)), rank=2)
    expression_of(model).leaf("offset").tensor().data += 0.7
    left = leaves_of(model)["left"]
    torch.testing.assert_close(left @ left.T @ change(model), change(model))
    assert change(model).norm() > 0.1


def test_the_adapter_loads(tmp_path: Path) -> None:
    assert_reloads(
        adapted("lora/qr", holding(normal(6, 8)), rank=3), holding(normal(6, 8)), normal(5, 8), tmp_path
    )
