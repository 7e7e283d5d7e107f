"""LoRA-C: a low-rank change of a kernel laid out as a matrix of channels times one window axis.

    dW = s view(B A, Co, Ci, k, k),   B in R^{Co k x r}, A in R^{r x Ci k},   W = W0 + dW,   s = alpha / r

Ding et al. 2024. The matrix has Co k rows, so it is squarer than the usual Co x Ci k^2, and its rank is at
most r, while the usual unfolding of dW may have rank r k. The layout is a plain view of the stored numbers:
entry (o, i, h, w) stands in row o k + (i k + h) // Ci and column ((i k + h) mod Ci) k + w. B = 0, A is
drawn as in LoRA; the paper keeps alpha / r constant over ranks. Start: the base, exactly.

Deviations: the rows take the first window axis, so that other windows than squares and one or three axes
work; with groups they count Co / groups, as in loralib's convolution.

Use it on convolutions; a linear layer has no window, and the change is LoRA's.
"""

from collections.abc import Callable
from dataclasses import replace

from ...weights import Dense, Viewed, Weight
from ..inits.kaiming import kaiming
from ..registry import structure
from ..site import Site


def viewed_change(site: Site, rank: int, scaling: float) -> Weight:
    """Return `scaling * view(up @ down)` with up = 0, up (Co / groups k, rank), down (rank, Ci k').

    Args:
        site: the weight; k is its first window size and k' the product of the others.
        rank: inner dimension of the product.
        scaling: the constant before the product.
    """
    first = site.window[0] if site.window else 1
    rows = site.shape[0] // site.layer.op.groups * first
    columns = site.shape[0] * site.shape[1] // rows
    form: Callable[[Dense, Dense], Weight] = lambda up, down: Viewed(up @ down, site.shape)  # noqa: E731
    return site.change(kaiming(replace(site, shape=(rows, columns)), rank, scaling), scaling, form=form)


@structure(
    "lora-c",
    title="LoRA-C: Parameter-Efficient Fine-Tuning of Robust CNN for IoT Devices",
    year=2024,
    arxiv="2410.16954",
    code="alexyyds2024/lora-C",
    formula="W = W0 + s view(B A), B A in R^{Co k x Ci k}",
    limit=None,
    pairs="parts",
    sides=True,
)
def lora_c(site: Site, rank: int, *, alpha: float | None = None) -> Weight:
    """Return W0 + s view(B A).

    Args:
        site: the weight.
        rank: inner dimension of B A.
        alpha: numerator of the scaling; the rank by default.
    """
    return site.base + viewed_change(site, rank, site.scaling(alpha, rank))
