"""Truncated decompositions agree with the full one, and say what they cannot do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankfold.errors import InvalidOption
from rankfold.linalg import range_finder, truncated_svd


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(rows: int, columns: int, decay: float) -> Tensor:
    """Return a matrix whose singular values are powers of `decay`."""
    size = min(rows, columns)
    left, right = torch.linalg.qr(normal(rows, size)).Q, torch.linalg.qr(normal(columns, size, seed=1)).Q
    return left * decay ** torch.arange(size, dtype=torch.float64) @ right.T


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.data())
def test_the_exact_one_is_the_best_approximation_of_its_rank(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    matrix = normal(rows, columns, seed)
    rank = data.draw(st.integers(1, min(rows, columns)))
    left, values, right = truncated_svd(matrix, rank)
    assert (left.shape, values.shape, right.shape) == ((rows, rank), (rank,), (rank, columns))
    identity = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(left.T @ left, identity)
    assert torch.allclose(right @ right.T, identity)
    assert (values.diff() <= 0).all()
    rest = torch.linalg.svdvals(matrix)[rank:]
    error = torch.linalg.matrix_norm(matrix - left * values @ right)
    assert torch.allclose(error, rest.norm(), atol=1e-10)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_the_largest_entry_of_every_left_vector_is_positive(rows: int, columns: int, seed: int) -> None:
    left, _, _ = truncated_svd(normal(rows, columns, seed), min(rows, columns))
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_sign_does_not_depend_on_that_of_the_matrix() -> None:
    matrix = normal(6, 4)
    left, _, right = truncated_svd(matrix, 3)
    opposite_left, _, opposite_right = truncated_svd(-matrix, 3)
    assert torch.allclose(left, opposite_left)
    assert torch.allclose(right, -opposite_right)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_the_randomised_one_finds_the_leading_triplets_of_a_decaying_spectrum(shape: tuple[int, int]) -> None:
    matrix = decaying(*shape, decay=0.7)
    left, values, right = truncated_svd(matrix, 5, iterations=2, generator=generator())
    exact_left, exact_values, exact_right = truncated_svd(matrix, 5)
    assert torch.allclose(values, exact_values, rtol=1e-6)
    assert torch.allclose(left, exact_left, atol=1e-4)
    assert torch.allclose(right, exact_right, atol=1e-4)


def test_power_iterations_improve_the_randomised_one() -> None:
    matrix = decaying(200, 150, decay=0.97)
    exact = torch.linalg.svdvals(matrix)[:4]
    errors = [
        float((truncated_svd(matrix, 4, iterations=i, generator=generator())[1] - exact).abs().max())
        for i in (0, 2, 6)
    ]
    assert errors[0] > 10 * errors[1] > 20 * errors[2]


def test_the_randomised_one_is_determined_by_its_generator_and_leaves_the_global_one_alone() -> None:
    matrix, before = decaying(80, 60, decay=0.95), torch.get_rng_state()
    first = truncated_svd(matrix, 3, iterations=1, generator=generator())
    second = truncated_svd(matrix, 3, iterations=1, generator=generator())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("iterations", [None, 1])
def test_a_matrix_of_lower_rank_and_a_matrix_of_zeros_have_finite_triplets(iterations: int | None) -> None:
    for matrix in (normal(8, 2) @ normal(2, 6), torch.zeros(8, 6, dtype=torch.float64)):
        left, values, right = truncated_svd(matrix, 4, iterations=iterations, generator=generator())
        assert all(t.isfinite().all() for t in (left, values, right))
        assert torch.allclose(left * values @ right, matrix, atol=1e-10)
        assert torch.allclose(left.T @ left, torch.eye(4, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 1\.\.min\(m, n\) = 3"):
        truncated_svd(normal(3, 5), rank)


@pytest.mark.parametrize("iterations", [None, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(value: float, iterations: int | None) -> None:
    with pytest.raises(InvalidOption, match=r"the matrix of shape \(2, 3\) holds NaN or infinite entries"):
        truncated_svd(torch.full((2, 3), value), 1, iterations=iterations)


def test_the_dtype_of_the_matrix_is_kept() -> None:
    for dtype in (torch.float32, torch.float64):
        triplets = truncated_svd(normal(6, 5).to(dtype), 2, iterations=1, generator=generator())
        assert {t.dtype for t in triplets} == {dtype}


def test_a_range_finder_gives_an_orthonormal_basis_that_contains_a_thin_range() -> None:
    matrix = normal(30, 3) @ normal(3, 20)
    basis = range_finder(matrix, 5, generator=generator())
    assert basis.shape == (30, 5)
    assert torch.allclose(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    assert torch.allclose(basis @ (basis.T @ matrix), matrix)


def test_a_range_finder_gives_no_more_columns_than_the_matrix_can_have() -> None:
    assert range_finder(normal(4, 9), 50, generator=generator()).shape == (4, 4)
    assert range_finder(normal(9, 4), 50, generator=generator()).shape == (9, 4)
