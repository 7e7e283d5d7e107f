"""Task arithmetic: what every model learned is added to the base.

    th* = th0 + lambda sum_t w_t (th_t - th0)

Ilharco et al. 2022. The weights w_t are the caller's, 1 where none are given; lambda is about 0.3 to 0.4 for
eight tasks, and 1 here, where w_t say it already. With w_t = 1/T it is the average of the models.
"""

from torch import Tensor

from ..parts import Parts
from ..registry import merger


@merger(
    "task-arithmetic",
    title="Editing Models with Task Arithmetic",
    year=2022,
    arxiv="2212.04089",
    code="mlfoundations/task_vectors",
    formula="th0 + lambda sum_t w_t (th_t - th0)",
    linear=True,
)
def task_arithmetic(parts: Parts, *, scale: float = 1.0) -> Tensor:
    """Return the base and the weighted task vectors.

    Args:
        parts: one tensor of all models.
        scale: lambda, of all task vectors together.

    Example:
        >>> import torch
        >>> base, model = torch.zeros(2), torch.tensor([1.0, 2.0])
        >>> task_arithmetic(Parts("w", (model, model), (0.5, 0.25), base))
        tensor([0.7500, 1.5000])
    """
    merged = parts.origin.clone()
    for model, weight in zip(parts.models, parts.weights, strict=True):
        merged.add_(model - parts.origin, alpha=scale * weight)
    return merged
