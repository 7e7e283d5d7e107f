"""TSV-M: the leading singular vectors of every task, made orthogonal to those of the other tasks.

    th_t - th0 ~ U_t diag(S_t) V_t^T        the leading floor(min(m, n) / T) components, at least one
    U = [U_1 | ... | U_T] = P D R^T,   U' = P R^T;   V' likewise
    th* = th0 + alpha U' diag(w_1 S_1, ..., w_T S_T) V'^T

Gargiulo et al. 2024, alpha = 1. Tasks in orthogonal subspaces keep what they learned unchanged. Of tensors
other than matrices, and of those named by `plain`, the mean change is added. One model keeps all components.

Components of a change beyond its rank are left out, and the polar factors leave out directions that the
vectors do not span: both would be an arbitrary basis that turns the vectors of the other tasks. So tasks of
low rank in orthogonal subspaces are untouched too, and tasks that are the same merge into that task.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...linalg import polar_factor
from ..parts import Parts
from ..registry import merger
from ..spectra import has_spectrum, nonzero


@merger(
    "tsv-m",
    title="Task Singular Vectors: Reducing Task Interference in Model Merging",
    year=2024,
    arxiv="2412.00081",
    code="AntoAndGar/task_singular_vectors",
    formula="th0 + alpha polar([U_1 .. U_T]) diag(S_1 .. S_T) polar([V_1 .. V_T])^T",
    aliases=("tsv",),
)
def tsv_m(parts: Parts, *, scale: float = 1.0, plain: Sequence[str] = ()) -> Tensor:
    """Return the base and the changes whose singular vectors were made orthogonal across tasks.

    Args:
        parts: one tensor of all models.
        scale: alpha, of the merged change.
        plain: patterns of names of matrices of which the mean change is added.

    Example:
        >>> first, second = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 3.0]))
        >>> tsv_m(Parts("w", (first, second), (1.0, 1.0), torch.zeros(2, 2))).abs()
        tensor([[2., 0.],
                [0., 3.]])
    """
    deltas = parts.spread() * parts.deltas
    if not has_spectrum(parts.name, deltas.shape[1:], plain):
        return parts.origin + scale * deltas.mean(0)
    return parts.origin + scale * without_interference(deltas)


def without_interference(deltas: Tensor) -> Tensor:
    """Return the sum of the leading parts of the changes (T, m, n), with orthogonal singular vectors.

    Example:
        >>> delta = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> bool(torch.allclose(without_interference(torch.stack([delta])), delta, atol=1e-6))
        True
    """
    kept = max(1, min(deltas.shape[1:]) // len(deltas))
    left, values, right = torch.linalg.svd(deltas, full_matrices=False)
    values, held = values[:, :kept], nonzero(values, deltas.shape)[:, :kept]
    lefts = torch.cat([*(left[:, :, :kept] * held[:, None])], 1)  # (m, T kept)
    rights = torch.cat([*(right[:, :kept] * held[:, :, None])], 0)  # (T kept, n)
    merged: Tensor = polar_factor(lefts) * values.flatten() @ polar_factor(rights)
    return merged
