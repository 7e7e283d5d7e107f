"""Embeddings of sentences, images or anything else, cut to their leading dimensions.

    z' = V_k^T z,   V_k (d, k) the first k eigenvectors of C = mean(z z^T),   |z| = 1

Inner products of unit vectors are cosines; of all projections to k dimensions V_k keeps the most of the
vectors' squared length, sum of the first k eigenvalues of C, and so of C's inner products. A model that was
trained so that its leading dimensions are an embedding themselves (Kusupati et al. 2022, `matryoshka`) needs
no rotation: V_k is then the first k columns of the identity. Divide by the length again before comparing.

Deviations: the paper cuts only what was trained for it. A stock encoder's dimensions are in no order, which
the rotation gives them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...catalogue import register
from ...errors import InvalidOption
from ...methods.limits import in_range
from ...statistics.finite import require_finite


@dataclass(frozen=True, eq=False)
class Truncation:
    """A projection that shortens embeddings, and what it keeps of those that it was made from.

    Attributes:
        projection: linear layer d -> k without a bias, for the end of the encoder, behind its pooling.
        length: share of the mean squared length of unit embeddings that is kept, in [0, 1].
        correlation: of the cosines of pairs before and after.
        change: mean absolute change of a cosine.
    """

    projection: nn.Linear
    length: float
    correlation: float
    change: float

    def to_dict(self) -> dict[str, float]:
        """Return the figures."""
        kept = self.projection.out_features / self.projection.in_features
        return {"kept": kept, "length": self.length, "correlation": self.correlation, "change": self.change}


@register(
    "compress",
    "matryoshka-truncation",
    title="Matryoshka Representation Learning",
    year=2022,
    arxiv="2205.13147",
    code="RAIVNLab/MRL",
    formula="z' = V_k^T z, V_k the first k eigenvectors of mean(z z^T), or of the identity",
)
@torch.no_grad()
def truncate_embeddings(
    embeddings: Tensor, *, keep: float = 0.5, width: int | None = None, rotate: bool = True
) -> Truncation:
    """Return the projection of embeddings to fewer dimensions.

    Args:
        embeddings: (n, d), of calibration data; at least two, of any length but zero.
        keep: share of the dimensions, in (0, 1].
        width: k itself, in [1, d]; None takes it from `keep`.
        rotate: by principal components; a model that was trained for it is cut as it is.

    Raises:
        InvalidOption: the embeddings are no matrix, or too few; k is not in its range.

    Example:
        >>> import torch
        >>> z = torch.randn(64, 3) @ torch.randn(3, 16)  # of rank 3 in 16 dimensions
        >>> cut = truncate_embeddings(z, width=3)
        >>> tuple(cut.projection(z).shape), round(cut.length, 3), round(cut.correlation, 3)
        ((64, 3), 1.0, 1.0)
    """
    if embeddings.dim() != 2 or len(embeddings) < 2:
        raise InvalidOption(
            f"embeddings are (n, d) with n at least 2, not of the shape {tuple(embeddings.shape)}"
        )
    in_range("matryoshka-truncation", "(0, 1]", keep=keep)
    require_finite(embeddings, "embeddings")
    full = embeddings.shape[1]
    size = max(1, int(keep * full)) if width is None else width
    in_range("matryoshka-truncation", f"[1, {full}]", width=size)
    unit = F.normalize(embeddings.double(), dim=1)
    basis = torch.eye(full, dtype=torch.float64, device=unit.device)
    if rotate:
        basis = torch.linalg.eigh(unit.T @ unit).eigenvectors.flip(1).T
    short = unit @ basis[:size].T
    projection = nn.Linear(full, size, bias=False, device=embeddings.device, dtype=embeddings.dtype)
    projection.weight.copy_(basis[:size])
    correlation, change = cosines_kept(unit, short)
    return Truncation(projection, float(short.square().sum() / len(unit)), correlation, change)


def cosines_kept(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the correlation, and the mean absolute difference, of all pairs' cosines in two sets.

    Args:
        before: (n, d).
        after: (n, k), of the same things.

    Example:
        >>> cosines_kept(torch.eye(3, 4), torch.eye(3))
        (1.0, 0.0)
    """
    pairs = torch.triu_indices(len(before), len(before), 1)
    first, second = (_cosines(z)[pairs[0], pairs[1]] for z in (before, after))
    change = float((first - second).abs().mean())
    spread = [cosines - cosines.mean() for cosines in (first, second)]
    lengths = spread[0].norm() * spread[1].norm()
    return (float(spread[0] @ spread[1] / lengths) if lengths > 0 else 1.0), change


def _cosines(embeddings: Tensor) -> Tensor:
    unit = F.normalize(embeddings.double(), dim=1)
    return unit @ unit.T
