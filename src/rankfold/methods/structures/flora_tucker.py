"""FLoRA: a Tucker change in the weight's own number of dimensions, without flattening a kernel.

    W = W0 + s G x_1 U_out x_2 U_in x_3 U_h x_4 U_w,   G = 0,   linear: W = W0 + s U_out G U_in^T

Si et al. 2024. G in R^{r_out x r_in x r_h x r_w}, U_out in R^{out x r_out}, U_in in R^{in x r_in}, ... are
all trained. Factors are Kaiming normal with a = sqrt(3), as in the original repository; window_rank = 2 is
its example's. On a convolution the change is a 1x1 mix to r channels, a small kernel and a 1x1 mix back.
Start: the base, exactly.

Deviations: s = alpha / r as in the authors' later library, 1 by default; one rank for both channel modes; an
embedding is a matrix like any other, where the original repository adds one vector to every row; no dropout
by default, where its example has 0.01.

Use it on convolutions, whose window it keeps apart from the channels.
"""

import math

from ...weights import Dropped, Tucker, Weight
from ..limits import in_range
from ..registry import structure
from ..site import Site


@structure(
    "flora-tucker",
    title="FLoRA: Low-Rank Core Space for N-dimension",
    year=2024,
    arxiv="2405.14739",
    code="SJTU-DeepVisionLab/FLoRA",
    formula="W = W0 + s G x_1 U_out x_2 U_in x_3 U_h x_4 U_w",
    limit=None,
    sides=True,
)
def flora_tucker(
    site: Site, rank: int, *, window_rank: int = 2, alpha: float | None = None, dropout: float = 0.0
) -> Weight:
    """Return W0 plus the Tucker change; a rank above a mode's size is that size.

    Args:
        site: the weight.
        rank: of the two channel modes.
        window_rank: of every window mode of a convolution.
        alpha: numerator of the scaling; the rank by default.
        dropout: probability, in [0, 1), of dropping an input entry of the change while training.
    """
    in_range("flora-tucker", "[1, inf)", window_rank=window_rank)
    in_range("flora-tucker", "[0, 1)", dropout=dropout)
    sizes = (site.shape[0], site.shape[1] // math.prod(site.window), *site.window)
    ranks = [min(rank, size) for size in sizes[:2]] + [min(window_rank, size) for size in sizes[2:]]
    names = ("out", "in", "window1", "window2", "window3")
    factors = [
        site.trained(site.normal(name, size, mode, std=math.sqrt(0.5 / mode)), name)
        for name, size, mode in zip(names, sizes, ranks, strict=False)
    ]
    change = site.scaling(alpha, rank) * Tucker(site.trained(site.zeros(*ranks), "core"), factors)
    return site.base + (Dropped(change, dropout) if dropout else change)
