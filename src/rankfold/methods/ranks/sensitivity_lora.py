"""Sensitivity-LoRA: ranks in proportion to second-order sensitivities that are measured once.

    loss(W + D) ~ loss(W) + 1/2 sum_ij h_ij D_ij^2,   s_ij = h_ij  (or 1/2 h_ij W0_ij^2)
    G_l = mean s,   L_l = mean of the k largest s, or exp(entropy(sigma(s) / sum sigma(s)))
    w_l = beta G_l / sum G + (1 - beta) L_l / sum L,   r_l in proportion to w_l,   sum_l r_l = r n

Zhang et al. 2025. h (out, in) is the diagonal of the Hessian of one weight, n the number of weights, r the
rank that was asked for. **The formulas are a reconstruction**: that a global metric and two local ones,
top-k and effective rank, are read off the diagonal of the Hessian is the paper's; the normalisation, beta =
0.5, k = 1 % of the entries and the bounds r/2 and 2r are choices. Without bounds a single weight takes
nearly all, because sensitivities differ by orders of magnitude. `hessian` says where h comes from:

    fisher      mean squared gradient, one backward pass (the default)
    hutchinson  Hutchinson's estimate of the diagonal itself, exact on average; negative entries count as 0
    gram        2 x_j^2 of the inputs, forward only: the layer's own reconstruction error. It is the same for
                all rows, so weights that share an input tie, and their effective rank is 1 without `weighted`

A larger h everywhere never gets less under top-k, the scale of h does not matter, and equal weights get r.
The effective rank measures how spread out h is and not how large. alpha is divided by r, whatever a weight
gets.

Deviation: means and not sums, so that a weight's size does not count.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...linalg import proportional
from ..limits import in_range, one_of
from ..registry import Need, ranks
from ..rules import Unit

HESSIANS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "fisher": ("squared_gradient", lambda value: value),
    "hutchinson": ("hessian_diagonal", lambda value: value.clamp_min(0)),
    "gram": ("column_norm", lambda value: 2 * value.square()),
}
LOCAL = ("top-k", "effective-rank")


def statistics(options: Mapping[str, Any], rank: int) -> list[Need]:
    """Return the statistic that the diagonal is read from."""
    return [_source(options["hessian"])[0]]


def _source(hessian: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    one_of("sensitivity-lora", HESSIANS, hessian=hessian)
    return HESSIANS[hessian]


def largest_rank(options: Mapping[str, Any], rank: int) -> int:
    """Return the most that one weight may get."""
    return round(float(options["maximum"]) * rank)


@ranks(
    "sensitivity-lora",
    needs=statistics,
    largest=largest_rank,
    status="experimental",
    title="Sensitivity-LoRA: Low-Load Sensitivity-Based Fine-Tuning for Large Language Models",
    year=2025,
    arxiv="2509.09119",
    formula="r_l in proportion to beta G_l / sum G + (1 - beta) L_l / sum L of the Hessian's diagonal",
)
def sensitivity_lora(
    units: Sequence[Unit],
    rank: int,
    *,
    hessian: str = "fisher",
    local: str = "top-k",
    beta: float = 0.5,
    top: float = 0.01,
    weighted: bool = False,
    minimum: float = 0.5,
    maximum: float = 2.0,
) -> dict[str, int]:
    """Share ranks out by sensitivity.

    Args:
        units: the weights.
        rank: r, the mean of what is shared out.
        hessian: fisher, hutchinson or gram.
        local: top-k or effective-rank.
        beta: share of the global metric, in [0, 1].
        top: share of a weight's entries that top-k takes, in (0, 1].
        weighted: multiply h by W0^2 / 2, the loss of taking an entry away.
        minimum: the least that a weight gets, as a multiple of r, in [0, 1].
        maximum: the most, as a multiple of r, at least 1.
    """
    in_range("sensitivity-lora", "[0, 1]", beta=beta, minimum=minimum)
    in_range("sensitivity-lora", "(0, 1]", top=top)
    in_range("sensitivity-lora", "[1, inf)", maximum=maximum)
    one_of("sensitivity-lora", LOCAL, local=local)
    found = [sensitivities(unit, hessian, weighted) for unit in units]
    overall = _normalised([float(s.mean()) for s in found])
    within = _normalised([top_mean(s, top) if local == "top-k" else effective_rank(s) for s in found])
    weights = [beta * g + (1 - beta) * own for g, own in zip(overall, within, strict=True)]
    multiple = units[0].multiple
    most = [_most(unit, round(maximum * rank)) // multiple * multiple for unit in units]
    least = [min(int(minimum * rank) // multiple * multiple, m) for m in most]
    shares = proportional(weights, rank * len(units), minimum=least, maximum=most, multiple=multiple)
    return {unit.path: share for unit, share in zip(units, shares, strict=True)}


def _most(unit: Unit, rank: int) -> int:
    return rank if unit.limit is None else min(rank, unit.limit)


def _normalised(metrics: Sequence[float]) -> list[float]:
    """Divide by the sum; all zero stays so."""
    total = sum(metrics)
    return [metric / total if total else 0.0 for metric in metrics]


def sensitivities(unit: Unit, hessian: str, weighted: bool) -> Tensor:
    """Return s (out, in) of a weight, in float64."""
    name, diagonal = _source(hessian)
    value = diagonal(unit.site.statistic(name).to(unit.site.device).double())
    if hessian == "gram":
        value = value.expand(unit.shape)
    return value * unit.site.matrix().double().square() / 2 if weighted else value


def top_mean(values: Tensor, share: float) -> float:
    """Return the mean of the largest entries, a share of all and at least one.

    Example:
        >>> top_mean(torch.tensor([[1.0, 5.0], [3.0, 0.0]]), 0.5)
        4.0
    """
    count = max(1, round(share * values.numel()))
    return float(values.flatten().topk(count).values.mean())


def effective_rank(matrix: Tensor) -> float:
    """Return exp(entropy) of the singular values as shares of their sum, from 1 to min(out, in); 0 of zero.

    Example:
        >>> round(effective_rank(torch.eye(3)), 6)
        3.0
    """
    values = torch.linalg.svdvals(matrix)
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
