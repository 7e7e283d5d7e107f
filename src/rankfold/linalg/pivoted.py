"""Decompositions by pivots: QR with column pivoting, and LDU with complete or row pivoting.

They cost O(m n r) and no iteration, and their pivots name actual rows and columns of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidOption, MissingDependency
from .checks import exact_dtype, null_level, require_matrix, require_rank
from .svd import completed_basis


@dataclass(frozen=True, eq=False)
class Pivoted:
    """A matrix by its leading pivots, `matrix ~ left diag(values) right`.

    Attributes:
        left: (m, r).
        values: (r,).
        right: (r, n), its columns in the order of the matrix.
        rows: indices of the pivot rows (r,); None for QR.
        columns: indices of the pivot columns (r,).
    """

    left: Tensor
    values: Tensor
    right: Tensor
    rows: Tensor | None
    columns: Tensor

    def matrix(self) -> Tensor:
        """Return the approximation (m, n)."""
        return self.left * self.values @ self.right


@torch.no_grad()
def pivoted_qr(matrix: Tensor, rank: int, *, backend: Literal["torch", "lapack"] = "torch") -> Pivoted:
    """Return the leading terms of the QR decomposition with column pivoting.

        W P = Q R,   R_11 >= R_22 >= ... >= 0,   W ~ Q_r diag(R_ii) (D^-1 R P^T)

    Every pivot is the column with the largest part outside the range of those before (Businger and Golub
    1965). `left` is Q with orthonormal columns; `right` is R divided by its diagonal, so right[:, columns] is
    unit upper triangular with entries of at most 1. Terms beyond the rank of the matrix have the value 0, an
    arbitrary orthonormal direction on the left, zeros on the right and unused columns as pivots.

    Args:
        matrix: W (m, n).
        rank: r.
        backend: "torch", own, which stops after r steps and runs on the device of the matrix; or "lapack",
            geqp3 through scipy on the CPU, faster for ranks near min(m, n).

    Raises:
        InvalidRank: the rank is not in 1..min(m, n).
        InvalidOption: NaN or infinite entries, or an unknown backend.
        MissingDependency: "lapack" without scipy.

    Example:
        >>> import torch
        >>> qr = pivoted_qr(torch.tensor([[0.0, 3.0, 1.0], [1.0, 0.0, 0.0]]), 1)
        >>> qr.columns, qr.values
        (tensor([1]), tensor([3.]))
    """
    require_matrix(matrix, "the matrix")
    require_rank(rank, min(matrix.shape))
    matrix = matrix.to(exact_dtype(matrix))
    if backend not in ("torch", "lapack"):
        raise InvalidOption(f"backend must be torch or lapack, not {backend!r}")
    # Measured on one core, 384 to 2048 rows and columns: same pivots, same error and orthogonality. LAPACK
    # always factors the whole matrix, so it takes 6 to 35 times longer at rank 8, as long at a sixth to
    # a third of min(m, n), and a fifth near it. The default does not depend on what is installed.
    solve = _own_qr if backend == "torch" else _lapack_qr
    basis, triangle, columns = solve(matrix, rank)
    return _divided(
        basis, triangle, columns, null_level(torch.linalg.matrix_norm(matrix)[None], max(matrix.shape))
    )


def _lapack_qr(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    try:
        from scipy.linalg import qr
    except ImportError:
        raise MissingDependency(
            "backend='lapack' needs the library scipy: pip install 'rankfold[solvers]', or take 'torch'"
        ) from None
    basis, triangle, columns = qr(matrix.cpu().numpy(), mode="economic", pivoting=True, check_finite=False)
    order = torch.from_numpy(columns).long()
    placed = torch.empty(rank, matrix.shape[1], dtype=matrix.dtype)
    placed[:, order] = torch.from_numpy(triangle[:rank])
    return torch.from_numpy(basis[:, :rank]).to(matrix), placed.to(matrix), order[:rank].to(matrix.device)


def _own_qr(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take the column with the largest residual, r times; downdate the squares of the residuals."""
    basis, triangle = matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
    squares = matrix.square().sum(0)
    trusted, columns = squares.clone(), list[int]()
    level = float(null_level(squares.sum().sqrt()[None], max(matrix.shape)))
    for step in range(rank):
        pivot, column = _largest_residual(matrix, basis[:, :step], squares, trusted)
        size = float(column.norm())
        if size <= level:
            break
        columns.append(pivot)
        basis[:, step] = column / size
        triangle[step] = basis[:, step] @ matrix
        triangle[step, columns[:-1]] = 0
        squares = (squares - triangle[step].square()).clamp(min=0)
    found = len(columns)
    basis = completed_basis(basis[:, :found], basis[:, found:]) if found < rank else basis
    picked = torch.tensor(_filled(columns, matrix.shape[1], rank), device=matrix.device)
    return basis, triangle, picked


def _largest_residual(matrix: Tensor, basis: Tensor, squares: Tensor, trusted: Tensor) -> tuple[int, Tensor]:
    """Return the column with the largest part outside the basis, and that part.

    Differences of squares lose their digits as a column shrinks: once the largest is below 1e-3 of the
    norms it was subtracted from (in float32 the noise is then 1e-4 of it), all are computed afresh.
    """
    if float(squares.max()) < 1e-3 * float(trusted.max()):
        residual = matrix - basis @ (basis.T @ matrix)
        squares.copy_(residual.square().sum(0))
        trusted.copy_(squares)
    pivot = int(squares.argmax())
    column = matrix[:, pivot]
    for _ in range(2):
        column = column - basis @ (basis.T @ column)
    return pivot, column


def _divided(basis: Tensor, triangle: Tensor, columns: Tensor, level: Tensor) -> Pivoted:
    """Return Q, R_ii >= 0 and R / R_ii."""
    diagonal = triangle[torch.arange(len(columns), device=columns.device), columns]
    alive = diagonal.abs() > level
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(basis.dtype)
    inverse = torch.where(alive, 1 / diagonal, 0)
    values = torch.where(alive, diagonal.abs(), 0)
    return Pivoted(basis * signs, values, inverse[:, None] * triangle, None, columns)


@torch.no_grad()
def pivoted_lu(matrix: Tensor, rank: int, *, pivoting: Literal["complete", "rows"] = "complete") -> Pivoted:
    """Return the leading terms of the LDU decomposition with pivots.

        P W Q = L D U,   W ~ (P^T L_r) diag(D_r) (U_r Q^T)

    left[rows] is unit lower triangular and right[:, columns] unit upper triangular; the approximation equals
    W on the pivot rows and columns. A pivot of zero gives the value 0, unit vectors on both sides, and
    unused rows and columns as pivots.

    Args:
        matrix: W (m, n).
        rank: r.
        pivoting: "complete", the largest entry of what remains, which makes every entry of left and right at
            most 1 and the first terms the important ones; or "rows", the largest of the next column, the
            columns in their own order: the leading terms of the LU decomposition that torch has.

    Raises:
        InvalidRank: the rank is not in 1..min(m, n).
        InvalidOption: NaN or infinite entries, or an unknown pivoting.

    Example:
        >>> import torch
        >>> lu = pivoted_lu(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1)
        >>> lu.rows, lu.columns, lu.values
        (tensor([1]), tensor([1]), tensor([4.]))
        >>> lu.matrix()
        tensor([[1.5000, 2.0000],
                [3.0000, 4.0000]])
    """
    require_matrix(matrix, "the matrix")
    require_rank(rank, min(matrix.shape))
    if pivoting not in ("complete", "rows"):
        raise InvalidOption(f"pivoting must be complete or rows, not {pivoting!r}")
    matrix = matrix.to(exact_dtype(matrix))
    return _row_pivots(matrix, rank) if pivoting == "rows" else _complete_pivots(matrix, rank)


def _complete_pivots(matrix: Tensor, rank: int) -> Pivoted:
    """Subtract the cross through the largest entry of what remains, r times."""
    # LAPACK's getc2, in scipy, takes square matrices only and always factors the whole; measured at 384 x 384
    # it takes 3.5 times as long as this at rank 8, and a seventh at rank 384. The pivots are the same.
    rest, (rows, columns) = matrix.clone(), matrix.shape
    left, upper = matrix.new_zeros(rows, rank), matrix.new_zeros(rank, columns)
    crosses = list[tuple[int, int]]()
    for step in range(rank):
        row, column = divmod(int(rest.abs().argmax()), columns)
        pivot = rest[row, column].clone()
        if pivot == 0:
            break
        crosses.append((row, column))
        left[:, step], upper[step] = rest[:, column] / pivot, rest[row]
        rest.addr_(left[:, step], upper[step], alpha=-1)
        # Zero in exact arithmetic; what rounding leaves must not become a pivot again.
        rest[row], rest[:, column] = 0, 0
    picked = [_filled([cross[side] for cross in crosses], matrix.shape[side], rank) for side in (0, 1)]
    return _unit(left, upper, *(torch.tensor(indices, device=matrix.device) for indices in picked))


def _row_pivots(matrix: Tensor, rank: int) -> Pivoted:
    """Factor the first r columns with torch, and solve for the rest of the upper factor."""
    # The form that does not raise at a pivot of zero.
    packed, swaps, _ = torch.linalg.lu_factor_ex(matrix[:, :rank])
    order = torch.arange(matrix.shape[0])
    for place, other in enumerate((swaps - 1).tolist()):
        order[[place, other]] = order[[other, place]]
    order = order.to(matrix.device)
    lower = packed.tril(-1)
    upper = torch.linalg.solve_triangular(lower[:rank], matrix[order[:rank]], upper=False, unitriangular=True)
    lower.diagonal().fill_(1)
    left = torch.empty_like(lower)
    left[order] = lower
    return _unit(left, upper.triu(), order[:rank], torch.arange(rank, device=matrix.device))


def _unit(left: Tensor, upper: Tensor, rows: Tensor, columns: Tensor) -> Pivoted:
    """Return L, D and D^-1 U; where a pivot is zero, unit vectors at its row and column."""
    terms = torch.arange(len(columns), device=columns.device)
    values = upper[terms, columns]
    dead = values == 0
    right = upper / torch.where(dead, 1, values)[:, None]
    right[dead] = 0
    right[terms, columns], left[rows, terms] = 1, 1
    return Pivoted(left, values, right, rows, columns)


def _filled(picked: list[int], size: int, count: int) -> list[int]:
    """Return the picked indices followed by unused ones."""
    return [*picked, *sorted(set(range(size)) - set(picked))][:count]
