"""SLTrain: a low-rank product plus a sparse matrix whose random support never changes.

    W = (alpha / r) B A + S,   S = scatter(v, Omega),   |Omega| = floor(density out in)

Han et al. 2024. Omega is drawn uniformly without replacement, once. Forward forms W, which is not kept:
backward forms it again, and of the wide gradient G the values take their own entries, dv = G[Omega]. Trained
numbers: r (out + in) + |Omega|. A is uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)), B = 0, v uniform in
+-1/sqrt(in). density = 0.03, r = 128 and alpha = 32 are the paper's for its model of 60M (0.05 for 7B).
Start: S alone.

Deviations: positions take four bytes, the official code's eight. It scales A by tanh of a number on request;
that is not in the paper and not here.
"""

import torch

from ...weights import Weight
from ..limits import in_range
from ..registry import not_base, structure
from ..selected import scattered
from ..site import Factors, Site


@structure(
    "sltrain",
    title="SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    year=2024,
    arxiv="2406.02214",
    code="andyjm3/SLTrain",
    formula="W = (alpha / r) B A + scatter(v, Omega), Omega random and fixed",
    start=not_base("that of the sparse part of every weight"),
    rank=128,
    pairs="terms",
    sides=True,
    entries=True,
    scratch=True,
)
def sltrain(site: Site, rank: int, *, density: float = 0.03, alpha: float | None = 32.0) -> Weight:
    """Return (alpha / r) B A + S.

    Args:
        site: the weight.
        rank: r, of the product beside the sparse part.
        density: share of the entries that S holds, in (0, 1].
        alpha: numerator of the scaling of B A; None takes r.
    """
    in_range("sltrain", "(0, 1]", density=density)
    (out, columns), bound = site.shape, site.shape[1] ** -0.5
    count = max(1, int(density * out * columns))
    support = torch.zeros(count, dtype=torch.long)
    if not site.blank:
        support = torch.randperm(out * columns, generator=site.generator("support"))[:count].sort().values
    factors = Factors(site.zeros(out, rank), site.uniform("down", rank, columns, bound=bound))
    values = site.uniform("values", count, bound=bound)
    return site.change(factors, site.scaling(alpha, rank)) + scattered(site, support, values)
