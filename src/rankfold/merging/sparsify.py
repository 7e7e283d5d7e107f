"""Which entries of a change are kept: the largest, or a band of magnitudes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidOption


def keep_largest(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor with all but its largest entries by magnitude set to zero.

    Of equal entries the first stay.

    Args:
        tensor: of any shape, float32 or better.
        count: of the entries that stay, 0..numel.

    Example:
        >>> keep_largest(torch.tensor([1.0, -3.0, 2.0, 2.0]), 2)
        tensor([ 0., -3.,  2.,  0.])
    """
    if count in (0, tensor.numel()):
        return tensor.clone() if count else torch.zeros_like(tensor)
    threshold, surplus = _nth_largest(tensor.detach().abs().reshape(-1), count)
    if threshold == 0:
        return tensor.clone()
    # What is as large as the threshold stays, and hardshrink keeps what is larger than its bound.
    below = torch.tensor(threshold, dtype=tensor.dtype).nextafter(torch.zeros((), dtype=tensor.dtype))
    kept = F.hardshrink(tensor.contiguous(), float(below))
    if surplus:
        equal = (kept.abs().reshape(-1) == threshold).nonzero().squeeze(1)
        kept.view(-1)[equal[len(equal) - surplus :]] = 0
    return kept


def keep_band(tensor: Tensor, smallest: int, largest: int) -> Tensor:
    """Return a tensor with so many entries of smallest and so many of largest magnitude set to zero.

    Example:
        >>> keep_band(torch.tensor([1.0, -9.0, 2.0, 3.0]), smallest=1, largest=1)
        tensor([0., 0., 2., 3.])
    """
    kept = keep_largest(tensor, tensor.numel() - smallest)
    return kept.sub_(keep_largest(tensor, largest)) if largest else kept


def part_of(count: int, fraction: float) -> int:
    """Return a fraction of a count, rounded down; what only rounding keeps from a whole number is one.

    Example:
        >>> part_of(100, 1 - 0.9 - 0.01), int((1 - 0.9 - 0.01) * 100)
        (9, 8)
    """
    return math.floor(round(fraction * count, 6))


def each(owner: str, name: str, value: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Return an option of fractions for every model, given one for all or one for each.

    Raises:
        InvalidOption: there is not one for each, or one lies outside 0..1.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(values) != count:
        raise InvalidOption(f"{owner}: {name} has {len(values)} values for {count} models")
    if not all(0 <= fraction <= 1 for fraction in values):
        raise InvalidOption(f"{owner}: {name} must lie in 0..1, not {value}")
    return tuple(float(fraction) for fraction in values)


def _nth_largest(magnitudes: Tensor, count: int) -> tuple[float, int]:
    """Return the smallest of so many largest numbers, and how many more than those are no smaller."""
    if magnitudes.device.type != "cpu":
        threshold = torch.topk(magnitudes, count, sorted=False).values.min()
        return float(threshold), int((magnitudes >= threshold).sum()) - count
    place = magnitudes.numel() - count
    ordered = magnitudes.numpy()
    ordered.partition(place)  # six times as fast as torch.kthvalue
    rest = ordered[:place]
    threshold = ordered[place]
    return float(threshold), int((rest == threshold).sum()) if rest.max() == threshold else 0
