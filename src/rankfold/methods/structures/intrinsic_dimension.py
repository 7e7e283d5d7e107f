"""Intrinsic dimension: all weights together move in one random subspace of a few dimensions.

    theta = theta_0 + P theta_d,   theta_0 in R^D all adapted weights, P (D, d) fixed, theta_d in R^d trained

Li et al. 2018. One projection, whose columns have length one over all weights together, not over each.

- dense: normal entries, columns normalised exactly; D d numbers in memory.
- sparse: an entry is there with probability 1 / sqrt(D) and of either sign, columns normalised; d sqrt(D).
- fastfood: P = (n / sqrt(D |G|^2)) H G Pi H B, cut to D rows: random signs B, a permutation Pi, normal
  numbers G on a diagonal, H the Walsh-Hadamard matrix of n = 2^ceil(log2 D), orthogonal. Columns have
  length one on average, 3 n numbers are kept, P is never formed, and a product takes n log n.

P is drawn from the seed and in no file, which holds theta_d alone. A forward projects once for all weights,
a backward once back. Start: theta_d = 0, the base, exactly. The smallest d with 90 % of the whole model's
score, d_int90, was about 750 for a network of 199,210 weights on MNIST; `rf.intrinsic_dimension_of` finds it.

Deviations: theta_0 is the adapted weights; biases and norms stay. sparse has its density over all weights,
the official code's per tensor. d = 1000 is this package's; more than D means D.

Use it where the question is how many numbers a task needs, or where a change has to be a few hundred of them.
"""

from collections.abc import Mapping

from ...weights import Weight
from ..registry import structure
from ..site import Planned, Site
from ..subspaces import projected, random_subspace


def one_subspace(
    sites: Mapping[str, Site], ranks: Mapping[str, int], *, seed: int, dimension: int, projection: str
) -> Planned:
    """Draw P for all weights."""
    return random_subspace("intrinsic-dimension", sites, seed, dimension, projection)


@structure(
    "intrinsic-dimension",
    title="Measuring the Intrinsic Dimension of Objective Landscapes",
    year=2018,
    arxiv="1804.08838",
    code="uber-research/intrinsic-dimension",
    formula="theta = theta_0 + P theta_d over all weights together",
    rank=None,
    limit=None,
    plan=one_subspace,
)
def intrinsic_dimension(site: Site, *, dimension: int = 1000, projection: str = "fastfood") -> Weight:
    """Return W0 and the weight's part of P theta_d.

    Args:
        site: the weight.
        dimension: d, numbers that train in the whole model.
        projection: fastfood, sparse or dense.
    """
    return site.base + projected(site)
