"""LoRMA: the weight is multiplied by a square matrix of low-rank origin.

    plus:   M = I + s B A,       pi:   M = s shift(B A), shift(X)[i, j] = X[i, (j - i) mod d],
    s = alpha / r
    pre:    W = M W0 (d = out),  post: W = W0 M (d = in),   B in R^{d x r}, A in R^{r x d}

Bihany et al. 2025. `plus` keeps the null space of W0 (pre) or its column space (post) and changes it by
rank r; `pi` rolls row i of B A by i, which makes its rank d. `plus` costs 2 r d multiply-adds per token
beside the base, `pi` needs the d x d matrix. r = 8 and alpha = r are the paper's for language
understanding. In plus, A is Kaiming uniform (a = sqrt 5) and B = 0; in pi, B is Kaiming with its first column
1, A zero but A[0, 0] = 1, both over sqrt(s). Start: the base up to rounding.

Deviations: the form without inflation, M = s B A, is left out, for it starts at a projection of the base;
no dropout, which the official code applies to the input of the whole weight; on an embedding, whose outputs
stand in columns, `pre` and `post` change places.
"""

import math

from ...errors import InvalidOption
from ...weights import Identity, Shifted, Weight
from ..registry import near_base, structure
from ..site import Site


@structure(
    "lorma",
    stage="transform",
    title="LoRMA: Low-Rank Multiplicative Adaptation for LLMs",
    year=2025,
    arxiv="2506.07621",
    code="Exploration-Lab/LoRMA",
    formula="W = (I + s B A) W0",
    start=near_base(1e-5),
)
def lorma(
    site: Site, rank: int, *, alpha: float | None = None, mode: str = "plus", side: str = "pre"
) -> Weight:
    """Return M W0 or W0 M.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        alpha: numerator of the scaling; the rank by default.
        mode: "plus" for I + s B A, "pi" for s shift(B A).
        side: "pre" multiplies the outputs, "post" the inputs.
    """
    if mode not in ("plus", "pi") or side not in ("pre", "post"):
        raise InvalidOption(f"lorma knows the modes plus, pi and the sides pre, post, not {mode!r}, {side!r}")
    outputs = (side == "pre") != site.looked_up
    scaling = site.scaling(alpha, rank)
    size = site.shape[0 if outputs else 1]
    matrix = _added(site, size, rank, scaling) if mode == "plus" else _shifted(site, size, rank, scaling)
    return matrix @ site.base if outputs else site.base @ matrix


def _added(site: Site, size: int, rank: int, scaling: float) -> Weight:
    up, down = site.zeros(size, rank), site.uniform("down", rank, size, bound=1 / math.sqrt(size))
    product = site.trained(up, "up") @ site.trained(down, "down")
    return Identity(size, site.dtype) + scaling * product


def _shifted(site: Site, size: int, rank: int, scaling: float) -> Weight:
    up, down = site.uniform("up", size, rank, bound=1 / math.sqrt(rank)), site.zeros(rank, size)
    up[:, 0], down[0, 0] = 1.0, 1.0
    root = math.sqrt(scaling)
    return scaling * Shifted(site.trained(up / root, "up") @ site.trained(down / root, "down"))
