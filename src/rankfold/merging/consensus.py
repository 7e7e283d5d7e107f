"""The mean over the models that agree in sign, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InvalidOption

MEANS = ("weighted", "count", "sum")
_CHUNK = 2**18


def agreeing_mean(changes: Sequence[Tensor], weights: Sequence[float], mean: str) -> Tensor:
    """Return the mean of the changes whose sign is the elected one; zeros do not count.

        g = sign(sum_t v_t), + where it is 0;   A_t = 1[sign(d_t) = g];   sum_t A_t w_t d_t / n

    Args:
        changes: d_t, of one shape.
        weights: w_t.
        mean: "weighted": v_t = w_t d_t and n = sum_t A_t w_t, so that a common factor of the weights means
            nothing; "sum": likewise and n = 1; "count": v_t = d_t and n = sum_t A_t. With v_t = w_t d_t it
            is the sign of w_t d_t that must agree.

    Raises:
        InvalidOption: there is no such mean.

    Example:
        >>> changes = torch.tensor([1.0, 1.0]), torch.tensor([3.0, -4.0])
        >>> agreeing_mean(changes, (1.0, 1.0), "count")
        tensor([ 2., -4.])
    """
    if mean not in MEANS:
        raise InvalidOption(f"mean must be one of {', '.join(MEANS)}, not {mean!r}")
    merged = torch.empty_like(changes[0], memory_format=torch.contiguous_format)
    flat = [change.reshape(-1) for change in changes]
    for start in range(0, merged.numel(), _CHUNK):  # what lies between is small and stays in the caches
        part = slice(start, start + _CHUNK)
        merged.view(-1)[part] = _agreeing_mean([change[part] for change in flat], weights, mean)
    return merged


def _agreeing_mean(changes: Sequence[Tensor], weights: Sequence[float], mean: str) -> Tensor:
    voices = [1.0] * len(weights) if mean == "count" else weights
    votes = torch.zeros_like(changes[0])
    for change, voice in zip(changes, voices, strict=True):
        votes.add_(change, alpha=voice)
    elected = votes.sign_().add_(0.5).sign_()  # a sum of zero counts as +
    merged, share = torch.zeros_like(elected), torch.zeros_like(elected)
    for change, weight, voice in zip(changes, weights, voices, strict=True):
        side = 0.0 if voice == 0 else math.copysign(1.0, voice)
        agreeing = (elected * change).mul_(side).clamp_(min=0)  # |d_t| where it agrees, else 0
        merged.add_(agreeing, alpha=side * weight)
        share.add_(agreeing.sign_(), alpha=voice)
    merged.mul_(elected)
    return merged if mean == "sum" else merged.div_(share.add_(share == 0))
