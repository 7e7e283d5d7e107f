"""OPCM: models arrive one after the other, and only what the merged change does not hold yet is added.

    D_1 = th_1 - th0
    D_t = D_{t-1} + N - U_r M V_r^T,   N = th_t - th0,   D_{t-1} = U diag(S) V^T of rank r
    M = U_r^T N V_r on the diagonal and in the block of the first k rows and columns, 0 elsewhere
    k = how many leading singular values sum to at most alpha of the sum of all
    th* = th0 + D_T / lambda_T,   lambda_T = ||D_T|| / mean_t ||th_t - th0||   (norms of all tensors together)

Tang et al. 2025, alpha = 0.5. The order is that of the models. Tensors that are no matrices, and embeddings,
add all of N. The change of a model is multiplied by its weight, 1 where none is given. Memory does not grow
with the number of models: one tensor of one model is held beside the merged one, and the merged changes lie
in temporary files until lambda is known.

The paper divides by lambda_t after every model and multiplies by it before the next one; U, V, r and k do not
depend on it, so it is applied once. Subtracting M is the paper's projection by full square singular matrices,
which are not formed. Two differences from the official code: at alpha = 1 the block is the whole spectrum,
where the code's search for a first index finds none and takes an empty block; and the diagonal is removed up
to the rank of D alone, since beyond it the singular vectors are an arbitrary basis. <D, N - U_r M V_r^T> = 0
always.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...formats.files import read_tensors, write_tensors
from ..registry import merger
from ..sources import Sources
from ..spectra import EMBEDDINGS, has_spectrum, nonzero


@merger(
    "opcm",
    title="Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model "
    "Merging",
    year=2025,
    arxiv="2501.09522",
    code="tanganke/opcm",
    formula="th0 + D / lambda, D <- D + (N projected away from D), ||D / lambda|| = mean_t ||th_t - th0||",
    whole=True,
)
def opcm(
    sources: Sources, *, alpha: float = 0.5, plain: Sequence[str] = EMBEDDINGS
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the merged model.

    Args:
        sources: the base and the models, in the order of their arrival.
        alpha: the share of the spectrum of what is merged so far whose subspace is closed to a new model, in
            0..1; 0 closes only the single directions.
        plain: patterns of names of matrices that are added without projection.

    Raises:
        InvalidOption: alpha is outside 0..1.
        Incompatible: no base is given.
    """
    if not 0 <= alpha <= 1:
        raise InvalidOption(f"opcm: alpha={alpha:g} must lie between 0 and 1")
    room = sources.scratch()
    norms = torch.zeros(sources.count + 1, dtype=torch.float64)  # squared: of each model's change, of the sum
    for index, name in enumerate(sources.names):
        merged = _merged_change(sources, name, alpha, plain, norms)
        write_tensors(_file(room, index), {"change": merged})
    shrink = _norm_ratio(norms)
    for index, name in enumerate(sources.names):
        base = sources.read(None, name)
        yield name, base + shrink * read_tensors(_file(room, index))["change"].to(base.device)


def without_overlap(change: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """Return the part of a change (m, n) that is orthogonal to what is merged already (m, n).

    Args:
        change: N, of the model that arrives.
        merged: D, of any scale.
        alpha: share of the spectrum of D whose subspace is closed, in 0..1.

    Example:
        >>> merged = torch.diag(torch.tensor([2.0, 0.0]))
        >>> without_overlap(torch.ones(2, 2), merged, 1.0)
        tensor([[0., 1.],
                [1., 1.]])
    """
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    rank = int(nonzero(values, merged.shape).sum())
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    inner = left.T @ change @ right.T
    block = _block(values, alpha)
    removed = torch.diag(inner.diagonal())
    removed[:block, :block] = inner[:block, :block]
    rest: Tensor = change - left @ removed @ right
    return rest


def _block(values: Tensor, alpha: float) -> int:
    if alpha == 1 or not len(values):
        return len(values)
    shares = values.cumsum(0) / values.sum()
    return int((shares <= alpha).sum())


def _merged_change(sources: Sources, name: str, alpha: float, plain: Sequence[str], norms: Tensor) -> Tensor:
    """Return D_T of one tensor, and add to the squared norms of the changes and of itself."""
    base = sources.read(None, name)
    spectral = has_spectrum(name, base.shape, plain)
    merged = torch.zeros_like(base)
    for number, weight in enumerate(sources.weights):
        change = weight * (sources.read(number, name) - base)
        norms[number] += _squared_norm(change)
        merged = merged + (without_overlap(change, merged, alpha) if spectral and number else change)
    norms[-1] += _squared_norm(merged)
    return merged


def _squared_norm(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _norm_ratio(norms: Tensor) -> float:
    """Return 1 / lambda; without any change, 1."""
    *own, total = norms.sqrt().tolist()
    return math.fsum(own) / len(own) / total if total > 0 else 1.0


def _file(room: Path, index: int) -> Path:
    return room / f"{index}.safetensors"
