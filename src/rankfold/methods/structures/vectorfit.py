"""VectorFit: train all singular values of the weight, freeze both singular bases.

    W = U (diag(S) + diag(d)) V^T = W0 + U diag(d) V^T,   d in R^k trained, k = min(out, in)

Hegde et al. 2025. U (out, k) and V^T (k, in) are frozen: svfit with the whole spectrum, so that k numbers
give a change of full rank. Start: d = 0, the base, exactly.

Deviations: the paper also trains the biases, which belong to the model here and stay frozen (`train=` trains
whole modules beside the adapter), and freezes the vectors that have moved most for a while; that is a matter
of the training, not of the structure.
"""

from ...weights import Diagonal, Weight
from ..framed import framed
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
)
def vectorfit(site: Site) -> Weight:
    """Return W0 + U diag(d) V^T over the whole spectrum."""
    size = min(site.shape)
    offset = Diagonal(site.trained(site.zeros(size), "offset"))
    return site.base + framed(site, site.basis(size), offset)
