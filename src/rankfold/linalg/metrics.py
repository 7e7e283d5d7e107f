"""Metrics of a weighted approximation: the matrices L and R of `||L (T - X) R||_F`.

No metric is the identity, written None. Every metric has to be symmetric, so that one object serves on either
side; none has to be invertible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidOption
from .checks import exact_dtype, null_level, precise_dtype, require_finite, require_matrix

NEGATIVE = 1e-3  # share of the largest eigenvalue; rounding of a long float32 sum stays far below it


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The metric diag(d): every row (on the left) or column (on the right) has a weight of its own.

    Attributes:
        entries: d (size,); zeros are allowed and mean that nothing is asked of that row or column.
    """

    entries: Tensor

    def form(self, size: int, damping: float, like: Tensor) -> Tensor:
        """Return d + damping * mean |d|."""
        entries = require_finite(self.entries, "a diagonal metric").to(like)
        if entries.shape != (size,):
            raise InvalidOption(f"a diagonal metric of shape {tuple(entries.shape)} needs {size} entries")
        return entries + damping * entries.abs().mean()


@dataclass(frozen=True, eq=False)
class Gram:
    """The metric C itself, a symmetric matrix, as CorDA weighs inputs by their Gram matrix.

    Attributes:
        matrix: C (size, size), of any rank.
    """

    matrix: Tensor

    def form(self, size: int, damping: float, like: Tensor) -> Tensor:
        """Return C + damping * mean(diag C) * I."""
        return damped(_symmetric(self.matrix, size).to(like), damping)


@dataclass(frozen=True, eq=False)
class RootGram:
    """The metric C^(1/2) of a Gram matrix C = X^T X / n: `||T C^(1/2)||_F` is the size of the outputs X T^T.

    The root costs one eigendecomposition at each use; weights that share their inputs share it through
    `Gram(psd_root(C))`.

    Attributes:
        matrix: C (size, size), symmetric and positive semi-definite, of any rank.
    """

    matrix: Tensor

    def form(self, size: int, damping: float, like: Tensor) -> Tensor:
        """Return (C + damping * mean(diag C) * I)^(1/2)."""
        return psd_root(_symmetric(self.matrix, size).to(like), damping=damping)


Metric = Diagonal | Gram | RootGram


def psd_root(gram: Tensor, *, damping: float = 0.0) -> Tensor:
    """Return the symmetric root of a positive semi-definite matrix.

        (C + damping * mean(diag C) * I)^(1/2) = Q max(Lambda, 0)^(1/2) Q^T

    Through its eigenvectors, in float64, rather than Cholesky, which fails on a singular matrix.

    Args:
        gram: C (n, n), symmetric; eigenvalues that are zero to rounding, or negative by it, count as zero.
        damping: at least 0.

    Returns:
        The root (n, n), in the dtype of the matrix, at least float32.

    Raises:
        InvalidOption: an eigenvalue is below -0.001 times the largest.

    Example:
        >>> import torch
        >>> psd_root(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
        tensor([[2., 0.],
                [0., 0.]])
    """
    values, vectors = torch.linalg.eigh(damped(gram.to(precise_dtype(gram)), damping))
    if values[0] < -NEGATIVE * values[-1].abs():
        raise InvalidOption(
            f"the Gram matrix has the eigenvalue {values[0]:.3g}: it is not positive semi-definite"
        )
    values = torch.where(values > null_level(values, len(values)), values, 0)
    root: Tensor = vectors * values.sqrt() @ vectors.T
    return root.to(exact_dtype(gram))


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return C + damping * mean(diag C) * I."""
    if damping < 0:
        raise InvalidOption(f"damping must be at least 0, not {damping}")
    if not damping:
        return gram
    return gram + damping * gram.diagonal().mean() * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )


def before(form: Tensor | None, matrix: Tensor) -> Tensor:
    """Return L M, where a form of one dimension is a diagonal and None the identity."""
    if form is None:
        return matrix
    return form[:, None] * matrix if form.dim() == 1 else form @ matrix


def after(matrix: Tensor, form: Tensor | None) -> Tensor:
    """Return M R, where a form of one dimension is a diagonal and None the identity."""
    if form is None:
        return matrix
    return matrix * form if form.dim() == 1 else matrix @ form


def _symmetric(matrix: Tensor, size: int) -> Tensor:
    require_matrix(matrix, "a Gram matrix")
    if matrix.shape != (size, size):
        raise InvalidOption(f"a Gram matrix of shape {tuple(matrix.shape)} needs the shape {(size, size)}")
    if not torch.allclose(matrix, matrix.T, rtol=1e-3, atol=1e-3 * float(matrix.abs().max())):
        raise InvalidOption(f"a Gram matrix of shape {tuple(matrix.shape)} is not symmetric")
    return matrix
