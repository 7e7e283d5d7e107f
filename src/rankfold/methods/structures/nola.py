"""NOLA: the factors of LoRA are mixtures of random matrices, of which only the coefficients are trained.

    W = W0 + s B A,   A = A0 + sum_{i=1..k} a_i A_i,   B = sum_{j=1..k} b_j B_j,   s = alpha / r

Koohpayegani et al. 2023. A_i in R^{r x in} and B_j in R^{out x r} are uniform on [-1, 1] / sqrt(k), drawn
from the seed whenever they are met, in forward and in backward, and never kept; A0, Kaiming uniform with
bound 1 / sqrt(in), is drawn once. 2 k numbers per weight are trained and stored, whatever its size and rank.
a = b = 0, as in the paper's code for language models, so that b alone has a gradient at first. Start: the
base, exactly.

Deviations: k = 256 within the paper's 128 to 1024; the form for vision models, which does not start at the
base, is left out.
"""

import math

from torch import Tensor

from ...errors import InvalidOption
from ...weights import RandomMixture, Weight
from ..registry import structure
from ..site import Site, derived_seed


@structure(
    "nola",
    title="NOLA: Compressing LoRA using Linear Combination of Random Basis",
    year=2023,
    arxiv="2310.02556",
    code="UCDvision/NOLA",
    formula="W = W0 + s (sum_j b_j B_j) (A0 + sum_i a_i A_i)",
    limit=None,
    sides=True,
)
def nola(site: Site, rank: int, *, alpha: float | None = None, count: int = 256) -> Weight:
    """Return W0 + s B A, both factors mixed.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        alpha: numerator of the scaling; the rank by default.
        count: k, random matrices per factor.
    """
    if count < 1:
        raise InvalidOption(f"nola: count must be at least 1, not {count}")

    out, columns = site.shape

    def mixed(name: str, shape: tuple[int, int], offset: Tensor | None = None) -> Weight:
        coefficients = site.trained(site.zeros(count), f"{name}.coefficients")
        return RandomMixture(coefficients, name, shape, derived_seed(site.seed, site.path, name), offset)

    fixed = site.uniform("down.offset", rank, columns, bound=1 / math.sqrt(columns))
    product = mixed("up", (out, rank)) @ mixed("down", (rank, columns), fixed)
    return site.base + site.scaling(alpha, rank) * product
