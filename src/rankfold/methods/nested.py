"""Losses summed over prefixes of an embedding, or over what is computed from each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidOption

Loss = Callable[..., Tensor]


def nested_sizes(width: int, smallest: int = 8) -> tuple[int, ...]:
    """Return lengths of prefixes that halve the width as long as they are not below the smallest.

    Example:
        >>> nested_sizes(64)
        (8, 16, 32, 64)
    """
    sizes = [width]
    while sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return tuple(reversed(sizes))


def checked_nesting(nesting: Sequence[int], width: int) -> tuple[int, ...]:
    """Return lengths that ascend to the width.

    Raises:
        InvalidOption: they do not.
    """
    sizes = tuple(nesting)
    if not sizes or sizes[0] < 1 or sizes[-1] != width or list(sizes) != sorted(set(sizes)):
        raise InvalidOption(f"matryoshka: nesting must ascend to the width {width}, and {sizes} does not")
    return sizes


def matryoshka_loss(
    outputs: Sequence[Tensor],
    target: Tensor,
    *,
    weights: Sequence[float] | None = None,
    loss: Loss = F.cross_entropy,
) -> Tensor:
    """Return `sum_m c_m loss(outputs_m, target)`, of the logits that a `MatryoshkaHead` returns.

    Args:
        outputs: of every prefix, in the order of the weights.
        target: the same for all.
        weights: c_m; None means 1 each.
        loss: of one output and the target.

    Raises:
        InvalidOption: there are not as many weights as outputs, or no output.
    """
    return _weighted([loss(output, target) for output in outputs], weights)


def nested_loss(
    *embeddings: Tensor,
    loss: Loss,
    nesting: Sequence[int],
    weights: Sequence[float] | None = None,
    normalise: bool = True,
) -> Tensor:
    """Return `sum_m c_m loss(prefixes of length m)`, for a loss of embeddings themselves.

    Args:
        embeddings: (..., d) each, such as those of questions and of answers; all are cut alike.
        loss: of as many prefixes as there are embeddings.
        nesting: M, ascending lengths that end with d.
        weights: c_m; None means 1 each.
        normalise: divide prefixes by their length, as contrastive losses want them.

    Raises:
        InvalidOption: the lengths do not ascend to d, or there are not as many weights.
    """
    checked_nesting(nesting, embeddings[0].shape[-1])
    cut = [[prefix(each, m, normalise=normalise) for each in embeddings] for m in nesting]
    return _weighted([loss(*prefixes) for prefixes in cut], weights)


def prefix(embedding: Tensor, length: int, *, normalise: bool = True) -> Tensor:
    """Return the first entries of an embedding (..., d), of length one if `normalise`.

    Example:
        >>> prefix(torch.tensor([3.0, 4.0, 12.0]), 2)
        tensor([0.6000, 0.8000])
    """
    return F.normalize(embedding[..., :length], dim=-1) if normalise else embedding[..., :length]


def _weighted(losses: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    if not losses:
        raise InvalidOption("matryoshka: a loss needs at least one prefix")
    shares = [1.0] * len(losses) if weights is None else list(weights)
    if len(shares) != len(losses):
        raise InvalidOption(f"matryoshka: {len(losses)} prefixes need as many weights, not {len(shares)}")
    return torch.stack([share * each for share, each in zip(shares, losses, strict=True)]).sum()
