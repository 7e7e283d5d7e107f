"""Linear: the weighted average of the models, entry by entry.

    th* = sum_t w_t th_t / sum_t w_t

Wortsman et al. 2022 average models fine-tuned with different settings (a "soup"). Without `normalize` it is
the weighted sum, for weights that sum to something else on purpose.
"""

from torch import Tensor

from ...errors import InvalidOption
from ..parts import Parts
from ..registry import merger


@merger(
    "linear",
    title="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
    "inference time",
    year=2022,
    arxiv="2203.05482",
    code="mlfoundations/model-soups",
    formula="sum_t w_t th_t / sum_t w_t",
    base="unused",
    linear=True,
)
def linear(parts: Parts, *, normalize: bool = True) -> Tensor:
    """Return the weighted average of the models.

    Args:
        parts: one tensor of all models.
        normalize: divide by the sum of the weights.

    Raises:
        InvalidOption: the weights sum to zero and are to be divided by their sum.

    Example:
        >>> import torch
        >>> ones = torch.ones(2)
        >>> linear(Parts("w", (0 * ones, ones), (1.0, 3.0)))
        tensor([0.7500, 0.7500])
    """
    total = sum(parts.weights) if normalize else 1.0
    if total == 0:
        raise InvalidOption("linear: the weights sum to zero; pass normalize=False to add without dividing")
    first, *others = (weight / total for weight in parts.weights)
    merged = first * parts.models[0]
    for model, weight in zip(parts.models[1:], others, strict=True):
        merged.add_(model, alpha=weight)
    return merged
