"""LoKr: a Kronecker product of two small matrices, the larger one of low rank.

    W = W0 + s W1 (x) W2,   W1 in R^{a x b}, W2 = B A in R^{c x d},   out = a c, in = b d,   s = alpha / r

Yeh et al. 2023 (LyCORIS). a <= c are the divisors of out closest to its root, b <= d those of the input
channels, or `factor` and what is left; the window of a convolution belongs to d. W2 is a full matrix where 2
r >= max(c, d), channels counted; with `decompose_both`, W1 is a product too while 2 r < max(a, b). rank(W -
W0) is rank(W1) rank(W2). Applied as W1 X W2^T, never formed. As in peft, W1 is zero (or its left factor), the
others Kaiming uniform with a = sqrt(5), r = 8, alpha = r, and s also scales full factors. Start: the base,
exactly.

Deviations: W2 of a convolution has no Tucker form; rank dropout is left out.
"""

import math

from ...errors import InvalidOption
from ...weights import Kronecker, Weight
from ..registry import structure
from ..site import Site


def factorise(size: int, wanted: int | None) -> tuple[int, int]:
    """Return two factors of a size, the smaller first.

    Args:
        size: the product.
        wanted: one of them where it divides, else a bound of the smaller one; None: as equal as can be.

    Example:
        >>> factorise(60, None), factorise(60, 4), factorise(60, 7), factorise(7, None)
        ((6, 10), (4, 15), (6, 10), (1, 7))
    """
    if wanted is not None and size % wanted == 0:
        return min(wanted, size // wanted), max(wanted, size // wanted)
    bound = min(math.isqrt(size), size if wanted is None else wanted)
    small = max(d for d in range(1, bound + 1) if size % d == 0)
    return small, size // small


@structure(
    "lokr",
    title="Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
    year=2023,
    arxiv="2309.14859",
    code="KohakuBlueleaf/LyCORIS",
    formula="W = W0 + s W1 (x) (B A)",
    limit=None,
)
def lokr(
    site: Site,
    rank: int,
    *,
    alpha: float | None = None,
    factor: int | None = None,
    decompose_both: bool = False,
) -> Weight:
    """Return W0 + s W1 (x) W2.

    Args:
        site: the weight.
        rank: of W2, and of W1 where it is a product; any, for full factors take over.
        alpha: numerator of the scaling; the rank by default.
        factor: the size of W1 on either side where it divides, else a bound; None or -1: near to W2's.
        decompose_both: let W1 be a product too where that is smaller.
    """
    factor = None if factor == -1 else factor  # as LyCORIS and peft write it
    if factor is not None and factor < 1:
        raise InvalidOption(f"lokr: factor must be at least 1, or None or -1 for near sizes, not {factor}")
    window = math.prod(site.window)
    (a, c), (b, d) = factorise(site.shape[0], factor), factorise(site.shape[1] // window, factor)

    def drawn(name: str, *shape: int) -> Weight:
        return site.trained(site.uniform(name, *shape, bound=1 / math.sqrt(shape[1])), name)

    if decompose_both and 2 * rank < max(a, b):
        first: Weight = site.trained(site.zeros(a, rank), "up1") @ drawn("down1", rank, b)
    else:
        first = site.trained(site.zeros(a, b), "first")
    full = 2 * rank >= max(c, d)
    second = (
        drawn("second", c, d * window) if full else drawn("up", c, rank) @ drawn("down", rank, d * window)
    )
    return site.base + site.scaling(alpha, rank) * Kronecker(first, second)
