"""SNELL: a sparse change, the largest entries of a matrix of distances between rows of two thin factors.

    W = W0 + top(K),   K_ij = 0.1 (||O_0i - P_0j|| - ||O_1i - P_1j||),   top(K) = K |K| where |K| is largest

Shen et al. 2024. O (2, out, q) and P (2, in, q) are trained, r (out + in) numbers with r = 2 q, and K has
full rank for any q. The share `zeroed` of the entries is zero, exactly, chosen anew in every forward, so no
index is stored; the matrix is formed again in backward and nothing of its size is kept. 0.1 and the uniform
start, bounds 1 / sqrt(out q) and 1 / sqrt(in q), are the official code's; there r is 8, 16 or 32, of
which snella's 32 is taken, and `zeroed` lies between 0.3 and above 0.9 by data set: 0.9 here. Without
gradients the matrix is kept from call to call. Start: near the base, for K is not zero: outputs move by 5e-5
of the largest in a layer of width 768, and by up to a tenth in one of width 4.

`shrink` says what a kept entry is worth: "magnitude" K |K|, the official code's, where |K| is a constant to
autograd; "soft" sign(K) (|K| - t), the paper's text, t the largest zeroed magnitude; "hard" K. With zeroed=0
the change is K, as in the official code. A convolution is applied through its whole weight, which autograd
then keeps.

Deviations: distances are Euclidean, the official default; at distance zero the gradient is zero instead of
not a number; ties are cut by position; `drop_path` is off unless asked for (0.1 in the paper's runs).
"""

import math
from collections.abc import Sequence

from ...weights import Leaf, Weight
from ...weights.competing import HEADS, SHRINKS, Competing, DroppedPath
from ..limits import in_range, one_of
from ..registry import near_base, structure
from ..site import Site


@structure(
    "snell",
    title="Expanding Sparse Tuning for Low Memory Usage",
    year=2024,
    arxiv="2411.01800",
    code="ssfgunner/SNELL",
    formula="W = W0 + K |K| on the largest |K|, K_ij = 0.1 (||O_0i - P_0j|| - ||O_1i - P_1j||)",
    start=near_base(0.1),
    rank=32,
    limit=None,
    multiple=lambda options: HEADS,
)
def snell(
    site: Site, rank: int, *, zeroed: float = 0.9, shrink: str = "magnitude", drop_path: float = 0.0
) -> Weight:
    """Return W0 plus the largest entries of the kernel matrix.

    Args:
        site: the weight.
        rank: r = 2 q, the numbers per row and column.
        zeroed: share of the entries that are zero, in [0, 1).
        shrink: what a kept entry is worth: "magnitude", "soft" or "hard".
        drop_path: probability, in [0, 1), of leaving the change out for a sample while training.
    """
    kept = kept_entries(site, zeroed)
    return site.base + competing(site, rank, kept, shrink if zeroed else "hard", drop_path)


def kept_entries(site: Site, zeroed: float) -> int:
    """Return how many entries are not zeroed, at least one.

    Raises:
        InvalidOption: the share is not in [0, 1).
    """
    in_range(site.path, "[0, 1)", zeroed=zeroed)
    return max(1, round((1 - zeroed) * math.prod(site.shape)))


def competing(
    site: Site, rank: int, kept: int | Leaf, shrink: str, drop_path: float, mixing: Sequence[Leaf] = ()
) -> Weight:
    """Return the largest entries of the kernel matrix of fresh factors, its whole path dropped on request."""
    one_of(site.path, SHRINKS, shrink=shrink)
    in_range(site.path, "[0, 1)", drop_path=drop_path)
    width = rank // HEADS
    output, inputs = (
        site.trained(site.uniform(name, HEADS, side, width, bound=1 / math.sqrt(side * width)), name)
        for name, side in zip(("output", "inputs"), site.shape, strict=True)
    )
    change = Competing(output, inputs, kept, shrink=shrink, mixing=mixing)
    return DroppedPath(change, drop_path) if drop_path else change
