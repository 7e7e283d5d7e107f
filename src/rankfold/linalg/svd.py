"""Truncated singular value decompositions, exact and randomised."""

from __future__ import annotations

import torch
from torch import Tensor


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
        ValueError: rank is not in 1..min(m, n).

    Example:
        >>> import torch
        >>> matrix = torch.outer(torch.arange(1.0, 5), torch.ones(3))
        >>> u, s, vt = truncated_svd(matrix, 1)
        >>> bool(torch.allclose(u * s @ vt, matrix, atol=1e-5))
        True
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} is not in 1..min(m, n) = {min(matrix.shape)}")
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = range_finder(matrix, rank + max(10, rank), iterations=iterations, generator=generator)
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    signs = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return left * signs, values, right * signs.T


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
