"""Decompositions by pivots are triangular where they say so, and one backend gives what the other gives."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linalg.matrices import normal, seeds, sizes, spectral
from torch import Tensor

from rankfold.errors import InvalidOption, InvalidRank, MissingDependency
from rankfold.linalg import Pivoted, nystrom, pivoted_lu, pivoted_qr, skeleton


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Draw a matrix of any rank, zero among them."""
    rows, columns, inner, seed = draw(sizes), draw(sizes), draw(st.integers(0, 9)), draw(seeds)
    return normal(rows, inner, seed=seed) @ normal(inner, columns, seed=seed + 1)


def is_unit_triangular(matrix: Tensor, noise: float) -> bool:
    """Return whether a matrix is unit upper triangular."""
    ones = torch.ones(len(matrix), dtype=matrix.dtype)
    return not matrix.tril(-1).any() and bool(torch.allclose(matrix.diagonal(), ones, atol=noise))


@given(matrices(), st.data(), st.sampled_from(["torch", "lapack"]))
def test_pivoted_qr_has_orthonormal_columns_falling_values_and_a_triangle_in_pivot_order(
    matrix: Tensor, data: st.DataObject, backend: str
) -> None:
    rank = data.draw(st.integers(1, min(matrix.shape)))
    qr = pivoted_qr(matrix, rank, backend=backend)
    noise = 1e-9 * float(matrix.norm() + 1)
    alive = int((qr.values > 0).sum())
    assert torch.allclose(qr.left.T @ qr.left, torch.eye(rank, dtype=torch.float64))
    assert (qr.values.diff() <= noise).all()
    assert len(qr.columns.unique()) == rank
    assert is_unit_triangular(qr.right[:alive][:, qr.columns[:alive]], 1e-9)
    assert not qr.right[alive:].any()
    assert (qr.right.abs() <= 1 + 1e-9).all()
    assert torch.allclose(qr.matrix(), qr.left @ qr.left.T @ matrix, atol=noise)
    assert torch.allclose(qr.matrix()[:, qr.columns], matrix[:, qr.columns], atol=noise)
    assert alive == min(rank, int(torch.linalg.matrix_rank(matrix)))


@given(sizes, sizes, seeds)
def test_both_backends_take_the_same_pivots_and_give_the_same_factors(
    rows: int, columns: int, seed: int
) -> None:
    matrix = normal(rows, columns, seed=seed)
    own, lapack = (pivoted_qr(matrix, min(rows, columns), backend=b) for b in ("torch", "lapack"))
    assert torch.equal(own.columns, lapack.columns)
    for name in ("left", "values", "right"):
        assert torch.allclose(getattr(own, name), getattr(lapack, name), atol=1e-7)


def test_in_float32_a_steep_spectrum_does_not_deceive_the_downdated_norms() -> None:
    matrix = spectral(60, 50, torch.logspace(0, -5, 50, dtype=torch.float64)).float()
    own, lapack = (pivoted_qr(matrix, 40, backend=b) for b in ("torch", "lapack"))
    identity = torch.eye(40)
    assert float((own.left.T @ own.left - identity).abs().max()) < 1e-5
    errors = [float((matrix - qr.matrix()).norm()) for qr in (own, lapack)]
    assert errors[0] < 1.2 * errors[1]
    assert torch.equal(own.columns[:15], lapack.columns[:15])


def test_pivots_are_right_where_differences_of_squares_have_lost_all_digits() -> None:
    own_parts = torch.linspace(0.2, 1, 12).diag()[:, torch.tensor([3, 8, 0, 11, 5, 1, 10, 2, 7, 4, 9, 6])]
    common = torch.tensor([[2e4] + 11 * [1e4]])
    matrix = torch.cat([common, own_parts])
    own, exact = pivoted_qr(matrix, 8), pivoted_qr(matrix.double(), 8, backend="lapack")
    assert own.columns.tolist() == exact.columns.tolist()
    assert torch.allclose(own.values.double(), exact.values, rtol=2e-3)


@given(matrices(), st.data())
def test_complete_pivots_are_the_largest_entries_of_what_remains(matrix: Tensor, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(matrix.shape)))
    lu = pivoted_lu(matrix, rank)
    rest = matrix.clone()
    for step in range(rank):
        row, column = int(lu.rows[step]), int(lu.columns[step])
        assert abs(float(rest[row, column]) - float(lu.values[step])) < 1e-9
        assert abs(float(rest.abs().max()) - abs(float(lu.values[step]))) < 1e-9
        rest = rest - lu.values[step] * lu.left[:, step].outer(lu.right[step])
    assert torch.allclose(lu.matrix(), matrix - rest, atol=1e-9)
    assert (lu.left.abs() <= 1 + 1e-9).all()
    assert (lu.right.abs() <= 1 + 1e-9).all()


def interpolates(near: Tensor, matrix: Tensor, rows: Tensor, columns: Tensor) -> bool:
    return bool(
        torch.allclose(near[rows], matrix[rows], atol=1e-7)
        and torch.allclose(near[:, columns], matrix[:, columns], atol=1e-7)
    )


@given(sizes, sizes, seeds, st.data(), st.sampled_from(["complete", "rows"]))
def test_lu_is_triangular_in_pivot_order_and_exact_on_the_pivot_rows_and_columns(
    rows: int, columns: int, seed: int, data: st.DataObject, pivoting: str
) -> None:
    matrix, rank = normal(rows, columns, seed=seed), data.draw(st.integers(1, min(rows, columns)))
    lu = pivoted_lu(matrix, rank, pivoting=pivoting)
    assert is_unit_triangular(lu.left[lu.rows].T, 1e-9)
    assert is_unit_triangular(lu.right[:, lu.columns], 1e-9)
    assert interpolates(lu.matrix(), matrix, lu.rows, lu.columns)


def test_pivoting_rows_alone_gives_the_leading_terms_of_the_decomposition_of_torch() -> None:
    matrix = normal(7, 5)
    permutation, lower, upper = torch.linalg.lu(matrix)
    lu = pivoted_lu(matrix, 3, pivoting="rows")
    assert torch.allclose(lu.left, permutation @ lower[:, :3])
    assert torch.allclose(lu.values[:, None] * lu.right, upper[:3])
    assert lu.columns.tolist() == [0, 1, 2]


def test_complete_pivots_are_those_of_lapack() -> None:
    from scipy.linalg.lapack import dgetc2

    matrix = normal(12, 12)
    packed, _, _, _ = dgetc2(matrix.numpy())
    assert torch.allclose(pivoted_lu(matrix, 12).values, torch.from_numpy(packed.diagonal().copy()))


@pytest.mark.parametrize("pivoting", ["complete", "rows"])
def test_a_pivot_of_zero_gives_a_zero_value_between_unit_vectors(pivoting: str) -> None:
    lu = pivoted_lu(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0], [0.0, 0.0, 5.0]]), 2, pivoting=pivoting)
    dead = lu.values == 0
    assert int(dead.sum()) == (1 if pivoting == "complete" else 2)
    assert lu.left[:, dead].count_nonzero() == lu.right[dead].count_nonzero() == dead.sum()
    assert len(lu.rows.unique()) == len(lu.columns.unique()) == 2


def test_a_skeleton_is_made_of_the_matrix_itself_and_exact_at_its_rank() -> None:
    matrix = normal(9, 3) @ normal(3, 8)
    near = skeleton(matrix, 3)
    assert torch.equal(near.left, matrix[:, near.columns])
    assert torch.equal(near.right, matrix[near.rows])
    assert torch.allclose(near.matrix(), matrix)


def test_a_skeleton_larger_than_the_rank_of_the_matrix_has_a_moderate_core() -> None:
    matrix = normal(9, 3) @ normal(3, 8)
    for near in (skeleton(matrix, 6), nystrom(matrix, 6)):
        assert torch.allclose(near.matrix(), matrix)
        assert float(near.core.norm()) < 100


@given(sizes, sizes, seeds, st.data())
def test_no_core_errs_less_than_that_of_the_skeleton(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    matrix, rank = normal(rows, columns, seed=seed), data.draw(st.integers(1, min(rows, columns)))
    near = skeleton(matrix, rank)
    rest = matrix - near.matrix()
    # Normal equations of the least squares in the core.
    slope = near.left.T @ rest @ near.right.T
    assert float(slope.norm()) < 1e-8 * float(matrix.norm() ** 3 + 1)
    interpolating = nystrom(matrix, rank, rows=near.rows, columns=near.columns)
    assert float(rest.norm()) <= float((matrix - interpolating.matrix()).norm()) + 1e-9


def test_pivots_choose_a_skeleton_near_the_best_approximation() -> None:
    values = torch.arange(1, 41, dtype=torch.float64) ** -1.5
    matrix = spectral(60, 40, values)
    best = float(values[10:].norm())
    assert float((matrix - skeleton(matrix, 10).matrix()).norm()) < 2 * best
    assert float((matrix - nystrom(matrix, 10, select="pivoted").matrix()).norm()) < 4 * best


@given(st.integers(2, 9), st.integers(2, 9), seeds, st.data(), st.sampled_from(["leading", "pivoted"]))
def test_a_nystrom_approximation_is_exact_on_its_rows_and_columns(
    rows: int, columns: int, seed: int, data: st.DataObject, select: str
) -> None:
    matrix, rank = normal(rows, columns, seed=seed), data.draw(st.integers(1, min(rows, columns) - 1))
    near = nystrom(matrix, rank, select=select)
    block = matrix[near.rows][:, near.columns]
    if torch.linalg.cond(block) < 1e6:
        assert interpolates(near.matrix(), matrix, near.rows, near.columns)
    if select == "leading":
        assert near.rows.tolist() == near.columns.tolist() == list(range(rank))


def test_the_rows_and_columns_of_a_skeleton_can_be_given() -> None:
    matrix = normal(6, 5)
    near = skeleton(matrix, 2, rows=[4, 1], columns=torch.tensor([0, 3]))
    assert torch.equal(near.right, matrix[[4, 1]])
    assert torch.equal(near.left, matrix[:, [0, 3]])


@pytest.mark.parametrize("decompose", [pivoted_qr, pivoted_lu, skeleton, nystrom])
def test_a_matrix_of_zeros_has_finite_factors_of_zero_product(decompose: object) -> None:
    near = decompose(torch.zeros(4, 3), 2)
    assert not near.matrix().any()
    parts = [near.left, near.right, near.values if isinstance(near, Pivoted) else near.core]
    assert all(part.isfinite().all() for part in parts)


@pytest.mark.parametrize("decompose", [pivoted_qr, pivoted_lu, skeleton, nystrom])
def test_nan_and_impossible_ranks_are_refused_by_name(decompose: object) -> None:
    with pytest.raises(InvalidOption, match=r"the matrix of shape \(2, 2\) holds NaN"):
        decompose(torch.full((2, 2), float("nan")), 1)
    for rank in (0, 4):
        with pytest.raises(InvalidRank, match=rf"rank {rank} is not in 1\.\.min\(m, n\) = 3"):
            decompose(torch.ones(3, 5), rank)


@pytest.mark.parametrize("rows", [[0, 0], [0, 7], [-1, 0], [0.0, 1.0], [], [1]])
def test_indices_that_are_no_skeleton_are_refused(rows: list[int]) -> None:
    sentence = "1 rows or columns" if len(rows) == 1 else r"different indices in 0\.\.4"
    with pytest.raises(InvalidOption, match=sentence):
        skeleton(normal(5, 5), 2, rows=rows)


def test_unknown_choices_are_refused() -> None:
    matrix = normal(3, 3)
    for call in (
        lambda: pivoted_qr(matrix, 1, backend="cuda"),
        lambda: pivoted_lu(matrix, 1, pivoting="rook"),
        lambda: nystrom(matrix, 1, select="random"),
    ):
        with pytest.raises(InvalidOption, match="must be"):
            call()


def test_the_lapack_backend_without_scipy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    with pytest.raises(MissingDependency, match=r"rankfold\[solvers\]"):
        pivoted_qr(normal(3, 3), 1, backend="lapack")
    assert pivoted_qr(normal(3, 3), 1).left.shape == (3, 1)
