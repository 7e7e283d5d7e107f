"""Kaiming start: a random down factor and a zero up factor, so the product is zero.

    A ~ U(-b, b), b = sqrt(6 / ((1 + a^2) in)),   B = 0,   B (out, r), A (r, in)

He et al. 2015. LoRA's start (Hu et al. 2021) has a = sqrt(5), the default, that is b = 1 / sqrt(in). For an
embedding, of which rows are read, A ~ N(0, 1), as in LoRA's code.
"""

import math

from ..limits import in_range
from ..registry import init
from ..site import Factors, Site


@init(
    "kaiming",
    gives="zero",
    title="Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification",
    year=2015,
    arxiv="1502.01852",
    formula="B = 0, A ~ U(-b, b), b = sqrt(6 / ((1 + a^2) in))",
)
def kaiming(site: Site, rank: int, scaling: float, *, a: float = math.sqrt(5)) -> Factors:
    """Return a zero product.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        scaling: not used.
        a: slope of the rectifier that the bound is meant for, at least 0.
    """
    in_range("kaiming", "[0, inf)", a=a)
    out, columns = site.shape
    bound = math.sqrt(6 / ((1 + a * a) * columns))
    down = (
        site.normal("down", rank, columns)
        if site.looked_up
        else site.uniform("down", rank, columns, bound=bound)
    )
    return Factors(site.zeros(out, rank), down)
