"""Truncated singular value decompositions, exact and randomised."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require_finite, require_rank


def truncated_svd(
    matrix: Tensor, rank: int, *, iterations: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets, `matrix ~ U diag(S) V^T`.

    Args:
        matrix: (m, n), float32 or float64.
        rank: number of triplets, at most min(m, n).
        iterations: power iterations of a randomised range finder (Halko et al. 2011), oversampled by
            max(10, rank); None computes the exact decomposition.
        generator: for the randomised one; drawn from on the CPU.

    Returns:
        U (m, rank), S (rank,), V^T (rank, n). Signs are fixed so that the largest entry of every column of
        U is positive.

    Raises:
        InvalidRank: rank is not in 1..min(m, n).
        InvalidOption: the matrix holds NaN or infinite entries.

    Example:
        >>> import torch
        >>> matrix = torch.outer(torch.arange(1.0, 5), torch.ones(3))
        >>> u, s, vt = truncated_svd(matrix, 1)
        >>> bool(torch.allclose(u * s @ vt, matrix, atol=1e-5))
        True
    """
    require_rank(rank, min(matrix.shape))
    require_finite(matrix, "the matrix")
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right = randomised_svd(matrix, rank, iterations=iterations, generator=generator)
    left, right = fixed_signs(left[:, :rank], right[:rank])
    return left, values[:rank], right


def randomised_svd(
    matrix: Tensor, rank: int, *, iterations: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular triplets of a matrix (m, n) within a random range oversampled by max(10, rank).

    There are min(rank + max(10, rank), m, n) of them; the leading `rank` are meant to be used. The last ones
    lie below the true values, and none is above its own.
    """
    basis = range_finder(matrix, rank + max(10, rank), iterations=iterations, generator=generator)
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right


def polar_factor(matrix: Tensor) -> Tensor:
    """Return U V^T of a matrix (m, n), over the singular values that are not zero.

    It is the gradient of the nuclear norm, the smallest one where there are several.

    Example:
        >>> polar_factor(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        tensor([[1., 0.],
                [0., 0.]])
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    nonzero = values > values[:1] * max(matrix.shape) * torch.finfo(values.dtype).eps
    factor: Tensor = (left * nonzero) @ right
    return factor


def range_finder(
    matrix: Tensor, columns: int, *, iterations: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Return an orthonormal basis (m, columns) near the leading left singular subspace of a matrix (m, n).

    Args:
        matrix: (m, n).
        columns: size of the basis, cut to min(m, n).
        iterations: power iterations, each re-orthonormalised.
        generator: for the Gaussian test matrix, drawn on the CPU.
    """
    columns = min(columns, *matrix.shape)
    test = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis: Tensor = torch.linalg.qr(matrix @ test).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis


def column_signs(columns: Tensor) -> Tensor:
    """Return the signs (..., 1, r) that make the largest entry of every column (..., m, r) positive."""
    signs = torch.sign(columns.gather(-2, columns.abs().argmax(-2, keepdim=True)))
    return torch.where(signs == 0, torch.ones_like(signs), signs)


def fixed_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return left (..., m, r) and right (..., r, n) with the largest entry of every column of left positive.

    The product is unchanged.
    """
    signs = column_signs(left)
    return left * signs, right * signs.mT


def completed_basis(basis: Tensor, extra: Tensor) -> Tensor:
    """Return orthonormal columns: those of the basis (m, q), then the extra ones (m, c) made orthonormal.

    An extra column that depends on those before it is replaced by a direction orthogonal to all of them.
    """
    orthonormal, triangle = torch.linalg.qr(torch.cat([basis, extra], 1))
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(basis.dtype)
    completed: Tensor = orthonormal * signs
    return completed
