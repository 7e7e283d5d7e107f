"""Monarch matrices, two block-diagonal factors around a stride permutation, and the nearest to a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidOption
from .checks import require_finite, require_matrix
from .svd import fixed_signs


@dataclass(frozen=True)
class MonarchFactors:
    """The two factors of a Monarch matrix (l s, k p).

    Inner channel c = kappa q + j = tau l + lambda connects block kappa of columns with block lambda of rows;
    rows are counted as sigma l + lambda.

    Attributes:
        left: (l, s, t), applied last.
        right: (k, q, p), applied first, with k q = l t.
        error: Frobenius norm of what the factors leave of the matrix that they were made from.
    """

    left: Tensor
    right: Tensor
    error: float = 0.0

    def dense(self) -> Tensor:
        """Return the matrix (l s, k p)."""
        return monarch_dense(self.left, self.right)


def monarch_dense(left: Tensor, right: Tensor) -> Tensor:
    """Multiply the factors (l, s, t) and (k, q, p) of a Monarch matrix out, to (l s, k p)."""
    (blocks, rows, inner), (count, height, columns) = left.shape, right.shape
    if height % blocks == 0:
        ranks = height // blocks
        pieces = torch.einsum(
            "lskr,krlp->slkp", left.unflatten(2, (count, ranks)), right.unflatten(1, (ranks, blocks))
        )
        return pieces.reshape(blocks * rows, count * columns)
    channel = torch.arange(count * height, device=right.device)
    wide = right.new_zeros(count * height, count, columns)
    wide = wide.index_put((channel, channel // height), right.flatten(0, 1))
    pieces = torch.einsum("lst,tlkp->slkp", left, wide.unflatten(0, (inner, blocks)))
    return pieces.reshape(blocks * rows, count * columns)


def monarch_projection(
    matrix: Tensor, *, row_blocks: int, column_blocks: int, inner: int | None = None
) -> MonarchFactors:
    """Return the Monarch matrix that is nearest in the Frobenius norm, and how far it is.

        M[lambda::l, kappa p : (kappa + 1) p]  ~  its truncated singular value decomposition, of rank q / l,
        error^2 = sum over the l k blocks of the squares of the singular values that are cut off

    Every block is approximated by itself, so rectangular matrices and ranks above one are projected as well
    as the square matrices of the paper; where l does not divide q, blocks differ in rank by one. A matrix
    that is Monarch with these sizes is returned exactly.

    Args:
        matrix: (l s, k p), real or complex.
        row_blocks: l, the number of blocks of the left factor.
        column_blocks: k, the number of blocks of the right factor.
        inner: q, rows of every block of the right factor; l divides k q. None takes l, blocks of rank one.

    Returns:
        left (l, s, k q / l), right (k, q, p) and the error; the root of every singular value goes to each.

    Raises:
        InvalidOption: the sizes do not divide, or the matrix holds NaN or infinite entries.

    Example:
        >>> import torch
        >>> rank_one = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 5))
        >>> found = monarch_projection(rank_one, row_blocks=2, column_blocks=2)
        >>> bool(torch.allclose(found.dense(), rank_one, atol=1e-5))
        True
    """
    require_finite(require_matrix(matrix, "the matrix"), "the matrix")
    rows, columns = _sizes(matrix, row_blocks, column_blocks)
    inner = row_blocks if inner is None else inner
    if inner < 1 or column_blocks * inner % row_blocks:
        raise InvalidOption(
            f"inner must be positive and column_blocks * inner a multiple of row_blocks = {row_blocks}, not "
            f"{column_blocks} * {inner}"
        )
    blocks = matrix.reshape(rows, row_blocks, column_blocks, columns).permute(1, 2, 0, 3)
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    if not matrix.is_complex():
        left, right = fixed_signs(left, right)
    return _dealt(left, values, right, inner)


def _sizes(matrix: Tensor, row_blocks: int, column_blocks: int) -> tuple[int, int]:
    sizes = []
    for what, size, count in zip(("rows", "columns"), matrix.shape, (row_blocks, column_blocks), strict=True):
        if count < 1 or size % count:
            raise InvalidOption(f"{size} {what} cannot be cut into {count} blocks of one size")
        sizes.append(size // count)
    return sizes[0], sizes[1]


def _dealt(left: Tensor, values: Tensor, right: Tensor, inner: int) -> MonarchFactors:
    """Give every inner channel the next singular triplet of the block that it belongs to."""
    row_blocks, column_blocks, most = left.shape[0], left.shape[1], left.shape[3]
    channel = torch.arange(column_blocks * inner, device=left.device)
    block = channel % row_blocks, channel // inner
    order = channel % inner // row_blocks
    triplet = (*block, order.clamp(max=most - 1))
    root = (values[triplet] * (order < most)).sqrt()[:, None]
    ups, downs = left.mT[triplet] * root, right[triplet] * root  # (k q, s) and (k q, p)
    left_factor = ups.unflatten(0, (-1, row_blocks)).permute(1, 2, 0).contiguous()
    ranks = torch.zeros_like(values[..., 0], dtype=torch.long)
    ranks.index_put_(block, torch.ones_like(channel), accumulate=True)
    cut = torch.arange(most, device=left.device) >= ranks[..., None]
    error = float(torch.linalg.vector_norm(values * cut))
    return MonarchFactors(left_factor, downs.unflatten(0, (column_blocks, inner)), error)
