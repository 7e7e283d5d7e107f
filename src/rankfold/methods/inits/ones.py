"""Ones: a product that starts at the matrix of ones, which is subtracted; the start of entrywise multipliers.

    U = [1 0 ... 0] (out, r),   V = [1; v_2; ...; v_r] (r, in),   v_t ~ U(-1, 1) / sqrt(in),
    s U V - 1 at the start 0

For W0 . (1 + s U V - 1) (HUT, 2024) this is W0 . (s U V), the direct form: unlike from a zero factor, both
factors have a gradient at the first step. With a scaling s, U and V carry 1 / sqrt(s) each. The paper's own
values of the rows of V that meet zeros of U are not known; they are Kaiming's here. Start: the base.
"""

import math

from ..registry import init, near_base
from ..site import Factors, Site


@init(
    "ones",
    gives="residual",
    structure="hut",
    title="HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation",
    year=2024,
    arxiv="2409.13501",
    formula="U V = 1, the first column of U and the first row of V ones",
    start=near_base(1e-6),
)
def ones(site: Site, rank: int, scaling: float) -> Factors:
    """Return factors with `scaling * up @ down` all ones."""
    out, columns = site.shape
    up, root = site.zeros(out, rank), 1 / math.sqrt(scaling)
    up[:, 0] = root
    down = site.uniform("down", rank, columns, bound=1 / math.sqrt(columns))
    down[0] = root
    return Factors(up, down, "residual")
