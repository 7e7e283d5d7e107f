"""VectorFit: train all singular values of the weight, freeze both singular bases.

    W = U (diag(S) + diag(d)) V^T = W0 + U diag(d) V^T,   d in R^k trained, k = min(out, in)

Hegde et al. 2025. U (out, k) and V^T (k, in) are frozen: svfit with the whole spectrum, so that k numbers
give a change of full rank. Start: d = 0, the base, exactly.

Adaptive vector freezing, which needs `attach`: with S = ||d||_1 / k of a weight, E <- beta E + (1 - beta) S
after every step. Every `interval` steps, from the share `warmup` of the training on, all vectors are released
and the `freeze` ones with the largest E are skipped by the optimizer until the next time: they keep value and
moments. The paper's numbers are not confirmed, so it is off by default (freeze = 0); beta = 0.99, the warm-up
of 0.1 and the 10 steps are this package's choices.

Deviation: the paper also trains the biases, and freezes them alike; they belong to the model here and stay
frozen (`train=` trains whole modules beside the adapter).
"""

from ...weights import Diagonal, Weight
from ..framed import framed
from ..freezing import FrozenVectors
from ..registry import structure
from ..site import Site


@structure(
    "vectorfit",
    title="VectorFit: Adaptive Singular & Bias Vector Fine-Tuning of Pre-trained Foundation Models",
    year=2025,
    arxiv="2503.19530",
    code="SuhasHegde25/VectorFit",
    formula="W = W0 + U diag(d) V^T, all min(out, in) singular values",
    init="svd",
    starts=("frame",),
    rank=None,
    training=FrozenVectors,
)
def vectorfit(
    site: Site, *, freeze: int = 0, interval: int = 10, warmup: float = 0.1, beta: float = 0.99
) -> Weight:
    """Return W0 + U diag(d) V^T over the whole spectrum.

    Args:
        site: the weight.
        freeze: how many vectors of the model are frozen at a time; 0 freezes none.
        interval: steps between two choices, at least 1.
        warmup: share of the training before the first choice, in [0, 1).
        beta: of the average of strengths, in [0, 1).
    """
    size = min(site.shape)
    offset = Diagonal(site.trained(site.zeros(size), "offset"))
    return site.base + framed(site, site.basis(size), offset)
