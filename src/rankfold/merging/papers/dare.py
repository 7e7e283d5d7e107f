"""DARE: entries of a change are dropped at random and the rest is enlarged, so that the mean stays.

    d_t = m_t (th_t - th0) / q,   m_t ~ Bernoulli(q) entry by entry,   E[d_t] = th_t - th0
    dare-linear: th* = th0 + lambda sum_t w_t d_t
    dare-ties:   th* = th0 + lambda mean_t { d_t : sign agrees with that of the sum }, as in TIES

Yu et al. 2023. q is what is kept, 0.1 here: the paper drops 90 % of the changes of fine-tuned language models
without loss. `rescale` "density" divides by q as the paper does; "l1" restores the tensor's sum of magnitudes
instead, as mergekit does, which is not unbiased; "none" leaves the kept entries as they are. Every tensor of
every model has a mask of its own, which the seed and the tensor's name determine.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidOption
from ..consensus import agreeing_mean
from ..parts import Parts
from ..registry import merger
from ..sparsify import each

_PAPER: dict[str, Any] = {
    "title": "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "year": 2023,
    "arxiv": "2311.03099",
    "code": "yule-BUAA/MergeLM",
}


@merger("dare-linear", formula="th0 + lambda sum_t w_t m_t (th_t - th0) / q", aliases=("dare",), **_PAPER)
def dare_linear(
    parts: Parts,
    *,
    density: float | Sequence[float] = 0.1,
    rescale: str = "density",
    scale: float = 1.0,
) -> Tensor:
    """Return the base and the weighted changes, of which a random part is kept.

    Args:
        parts: one tensor of all models.
        density: q, the part of the entries that is kept on average, in 0..1; or one for each model.
        rescale: "density", "l1" or "none".
        scale: lambda, of all changes together.

    Raises:
        InvalidOption: the density lies outside 0..1, or there is no such rescaling.

    Example:
        >>> models = torch.ones(2, 3), torch.zeros(2, 3)
        >>> dare_linear(Parts("w", models, (1.0, 1.0), torch.zeros(2, 3)), density=1.0).unique()
        tensor([1.])
    """
    changes = dropped(parts, each("dare-linear", "density", density, len(parts.models)), rescale)
    merged = parts.origin.clone()
    for change, weight in zip(changes, parts.weights, strict=True):
        merged.add_(change, alpha=scale * weight)
    return merged


@merger("dare-ties", formula="th0 + lambda mean_t { m_t (th_t - th0) / q : sign agrees }", **_PAPER)
def dare_ties(
    parts: Parts,
    *,
    density: float | Sequence[float] = 0.1,
    rescale: str = "density",
    mean: str = "weighted",
    scale: float = 1.0,
) -> Tensor:
    """Return the base and the mean of what was kept at random and agrees in sign.

    Args:
        parts: one tensor of all models.
        density: q, the part of the entries that is kept on average, in 0..1; or one for each model.
        rescale: "density", "l1" or "none".
        mean: "weighted", "count" or "sum": see `agreeing_mean`.
        scale: lambda, of the mean.

    Raises:
        InvalidOption: the density lies outside 0..1, or there is no such rescaling or mean.

    Example:
        >>> models = torch.ones(2), torch.zeros(2)
        >>> dare_ties(Parts("w", models, (1.0, 1.0), torch.zeros(2)), density=1.0)
        tensor([1., 1.])
    """
    changes = dropped(parts, each("dare-ties", "density", density, len(parts.models)), rescale)
    return agreeing_mean(changes, parts.weights, mean).mul_(scale).add_(parts.origin)


def dropped(parts: Parts, densities: Sequence[float], rescale: str) -> list[Tensor]:
    """Return the changes of all models, of each of which a random part is kept and rescaled."""
    if rescale not in ("density", "l1", "none"):
        raise InvalidOption(f"rescale must be density, l1 or none, not {rescale!r}")
    changes = []
    for number, (model, density) in enumerate(zip(parts.models, densities, strict=True)):
        change = model - parts.origin
        kept = change * mask(parts, number, density) if density < 1 else change
        changes.append(kept * _factor(change, kept, density, rescale))
    return changes


def mask(parts: Parts, number: int, density: float) -> Tensor:
    """Return the random mask of one model's tensor: 1 with probability `density`, else 0."""
    model = parts.models[number]
    drawn = torch.empty(model.shape, dtype=model.dtype)
    return drawn.bernoulli_(density, generator=parts.generator("dare", number)).to(model.device)


def _factor(change: Tensor, kept: Tensor, density: float, rescale: str) -> float:
    if rescale == "none" or density in (0.0, 1.0):
        return 1.0
    if rescale == "density":
        return 1 / density
    before, after = float(change.abs().sum()), float(kept.abs().sum())
    return before / after if after else 1.0
