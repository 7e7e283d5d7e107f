"""Model Breadcrumbs: every model's change without its smallest and its largest entries is added to the base.

    th* = th0 + lambda sum_t w_t m_t (th_t - th0),   m_t = 0 on the smallest and the largest entries, else 1

Davari and Belilovsky 2023. Entries are ranked by magnitude within each tensor, and what is kept is not
rescaled: of a tensor of n entries n - floor(hi n) - floor(lo n) remain, so that one huge outlier is removed,
which trimming by magnitude keeps. With nothing dropped it is task arithmetic. lambda = 0.3, 85 % and 1 % are
of the order that the paper finds; the same values serve for any number of tasks.

mergekit says `density` for the part kept and `gamma` for the part cut at the top, which drops the smallest
1 - density - gamma here.
"""

from collections.abc import Sequence

from torch import Tensor

from ...errors import InvalidOption
from ..parts import Parts
from ..registry import merger
from ..sparsify import each, keep_band, part_of


@merger(
    "breadcrumbs",
    title="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    year=2023,
    arxiv="2312.06795",
    code="rezazzr/breadcrumbs",
    formula="th0 + lambda sum_t w_t m_t (th_t - th0), m_t = 0 on the smallest and the largest entries",
)
def breadcrumbs(
    parts: Parts,
    *,
    drop_smallest: float | Sequence[float] = 0.85,
    drop_largest: float | Sequence[float] = 0.01,
    scale: float = 0.3,
) -> Tensor:
    """Return the base and the changes without their smallest and largest entries.

    Args:
        parts: one tensor of all models.
        drop_smallest: part of the entries of each tensor left out from below, in 0..1; or one for each model.
        drop_largest: likewise from above; both together at most 1.
        scale: lambda, of all changes together.

    Raises:
        InvalidOption: a part lies outside 0..1, or both together are more than 1.

    Example:
        >>> import torch
        >>> model = torch.tensor([0.1, 9.0, 1.0, -2.0])
        >>> parts = Parts("w", (model,), (1.0,), torch.zeros(4))
        >>> breadcrumbs(parts, drop_smallest=0.25, drop_largest=0.25, scale=1.0)
        tensor([ 0.,  0.,  1., -2.])
    """
    small = each("breadcrumbs", "drop_smallest", drop_smallest, len(parts.models))
    large = each("breadcrumbs", "drop_largest", drop_largest, len(parts.models))
    if any(low + high > 1 + 1e-9 for low, high in zip(small, large, strict=True)):
        raise InvalidOption("breadcrumbs: drop_smallest and drop_largest are more than all together")
    merged = parts.origin.clone()
    for model, weight, low, high in zip(parts.models, parts.weights, small, large, strict=True):
        change = model - parts.origin
        count = change.numel()
        kept = keep_band(change, part_of(count, low), part_of(count, high))
        merged.add_(kept, alpha=scale * weight)
    return merged
