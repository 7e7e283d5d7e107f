"""TIES: small changes are trimmed, signs are elected by mass, and only what agrees is averaged.

    d_t = the entries of th_t - th0 of largest magnitude, a part `density` of each tensor, zero elsewhere
    th* = th0 + lambda mean_t { d_t : sign(d_t) = sign(sum_t d_t) }

Yadav et al. 2023. Trimming is per tensor and leaves at least one entry; a sum of zero elects plus; zeros take
no part in the mean. density = 0.2 and lambda = 1 are the paper's. With weights the field has two readings,
both here as `mean`: "weighted" multiplies before the election and divides by the sum of the agreeing weights,
as mergekit does; "count" elects by the changes themselves, multiplies afterwards and divides by the number
that agree, as peft does. Without weights they are the same.
"""

from collections.abc import Sequence

from torch import Tensor

from ..consensus import agreeing_mean
from ..parts import Parts
from ..registry import merger
from ..sparsify import each, keep_largest


@merger(
    "ties",
    title="TIES-Merging: Resolving Interference When Merging Models",
    year=2023,
    arxiv="2306.01708",
    code="prateeky2806/ties-merging",
    formula="th0 + lambda mean_t { trim(th_t - th0) : sign agrees with that of the sum }",
)
def ties(
    parts: Parts, *, density: float | Sequence[float] = 0.2, mean: str = "weighted", scale: float = 1.0
) -> Tensor:
    """Return the base and the mean of the trimmed changes that agree in sign.

    Args:
        parts: one tensor of all models.
        density: part of the entries of each tensor that is kept, in 0..1; or one for each model.
        mean: "weighted", "count" or "sum": see `agreeing_mean`.
        scale: lambda, of the mean.

    Raises:
        InvalidOption: the density lies outside 0..1, or there is no such mean.

    Example:
        >>> import torch
        >>> models = torch.tensor([3.0, 0.1]), torch.tensor([-1.0, 0.3])
        >>> ties(Parts("w", models, (1.0, 1.0), torch.zeros(2)), density=1.0)
        tensor([3.0000, 0.2000])
    """
    densities = each("ties", "density", density, len(parts.models))
    changes = [trimmed(m - parts.origin, d) for m, d in zip(parts.models, densities, strict=True)]
    return agreeing_mean(changes, parts.weights, mean).mul_(scale).add_(parts.origin)


def trimmed(change: Tensor, density: float) -> Tensor:
    """Return a change with all but its entries of largest magnitude set to zero, at least one of them kept.

    Example:
        >>> import torch
        >>> trimmed(torch.tensor([1.0, -2.0, 3.0]), 0.7)
        tensor([ 0., -2.,  3.])
    """
    if density >= 1 or not change.numel():
        return change
    count = max(1, int(density * change.numel())) if density > 0 else 0
    return keep_largest(change, count)
