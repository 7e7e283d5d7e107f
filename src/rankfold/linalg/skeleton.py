"""A matrix by some of its own rows and columns: skeleton (CUR) and Nyström approximations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidOption
from .checks import exact_dtype, require_indices, require_matrix, require_rank
from .pivoted import pivoted_qr


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A matrix by columns, a core and rows of its own, `matrix ~ left core right`.

    Attributes:
        left: columns of the matrix (m, r), bit for bit.
        core: (r, r).
        right: rows of the matrix (r, n), bit for bit.
        rows: their indices (r,).
        columns: their indices (r,).
    """

    left: Tensor
    core: Tensor
    right: Tensor
    rows: Tensor
    columns: Tensor

    def matrix(self) -> Tensor:
        """Return the approximation (m, n)."""
        return self.left @ self.core @ self.right


@torch.no_grad()
def skeleton(
    matrix: Tensor,
    rank: int,
    *,
    rows: Sequence[int] | Tensor | None = None,
    columns: Sequence[int] | Tensor | None = None,
) -> Skeleton:
    """Return the best approximation of a matrix between some of its columns and some of its rows.

        W ~ C K R,   C = W[:, J],   R = W[I],   K = C^+ W R^+ = argmin ||W - C K R||_F

    J are the pivots of a QR decomposition with column pivoting of W, I those of C^T, which makes W[I, J] well
    conditioned. Pseudo-inverses drop directions that are zero to rounding.

    Args:
        matrix: W (m, n).
        rank: r.
        rows: I instead; all different.
        columns: J instead.

    Raises:
        InvalidRank: the rank is not in 1..min(m, n).
        InvalidOption: NaN or infinite entries, or indices that are not r different ones of the matrix.

    Example:
        >>> import torch
        >>> skeleton(torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])), 1).core
        tensor([[0.1667]])
    """
    matrix, lines, picked = _lines(matrix, rank, rows, columns, "pivoted")
    left, right = matrix[:, picked], matrix[lines]
    rtol = max(matrix.shape) * torch.finfo(matrix.dtype).eps
    core = torch.linalg.pinv(left, rtol=rtol) @ matrix @ torch.linalg.pinv(right, rtol=rtol)
    return Skeleton(left, core, right, lines, picked)


@torch.no_grad()
def nystrom(
    matrix: Tensor,
    rank: int,
    *,
    rows: Sequence[int] | Tensor | None = None,
    columns: Sequence[int] | Tensor | None = None,
    select: Literal["leading", "pivoted"] = "leading",
) -> Skeleton:
    """Return the approximation of a matrix that is exact on some of its columns and rows.

        W ~ W[:, J] W[I, J]^+ W[I]

    Where W[I, J] can be inverted, the approximation equals W on the rows I and the columns J, and elsewhere
    errs by the Schur complement of W[I, J]. Of all cores that of `skeleton` errs least in all; this one reads
    r rows and columns of W only.

    Args:
        matrix: W (m, n).
        rank: r.
        rows: I; all different.
        columns: J; all different.
        select: where I or J is not given, the first r ("leading"), or the pivots that `skeleton` takes.

    Raises:
        InvalidRank: the rank is not in 1..min(m, n).
        InvalidOption: NaN or infinite entries, indices that are not r different ones of the matrix, or an
            unknown selection.

    Example:
        >>> import torch
        >>> near = nystrom(torch.tensor([[2.0, 4.0], [1.0, 3.0]]), 1)
        >>> near.matrix()
        tensor([[2., 4.],
                [1., 2.]])
    """
    if select not in ("leading", "pivoted"):
        raise InvalidOption(f"select must be leading or pivoted, not {select!r}")
    matrix, lines, picked = _lines(matrix, rank, rows, columns, select)
    block = matrix[lines][:, picked]
    core = torch.linalg.pinv(block, rtol=rank * torch.finfo(matrix.dtype).eps)
    return Skeleton(matrix[:, picked], core, matrix[lines], lines, picked)


def _lines(
    matrix: Tensor,
    rank: int,
    rows: Sequence[int] | Tensor | None,
    columns: Sequence[int] | Tensor | None,
    select: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrix in the dtype it is computed in, and the indices of its rows and columns."""
    require_matrix(matrix, "the matrix")
    require_rank(rank, min(matrix.shape))
    matrix = matrix.to(exact_dtype(matrix))
    leading = torch.arange(rank, device=matrix.device)
    pivoted = select == "pivoted"
    if columns is not None:
        picked = _indices(columns, rank, matrix.shape[1], matrix.device)
    else:
        picked = pivoted_qr(matrix, rank).columns if pivoted else leading
    if rows is not None:
        lines = _indices(rows, rank, matrix.shape[0], matrix.device)
    else:
        lines = pivoted_qr(matrix[:, picked].T, rank).columns if pivoted else leading
    return matrix, lines, picked


def _indices(given: Sequence[int] | Tensor, rank: int, size: int, device: torch.device) -> Tensor:
    indices = require_indices(torch.as_tensor(given, device=device), size, "rows and columns")
    if len(indices) != rank:
        raise InvalidOption(f"{len(indices)} rows or columns do not make a skeleton of rank {rank}")
    return indices
