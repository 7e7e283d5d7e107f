"""AFM's factors: a product with the network's activation inside, and for tables a product and an offset.

    y = B f(A x + c) + b,   B (out, r),   A (r, in),   c (r,)          of a linear layer
    E = B A + 1 m^T,        B (vocabulary, r),   A (r, d),   m (d,)    of a table of embeddings

Yu et al. 2024 compress models for the prediction of clicks so, and then train them further. Of the model's
usual start W0 the factors take the best rank-r part, split evenly, of a table without the mean of its rows,
which is m; c starts at zero. f = "identity" gives a plain product without c, and "relu" is the network's own
activation of the paper. Start: as above, which is not W0. With another f than the identity a linear layer is
no linear map of its input, has no matrix and cannot be folded.

Deviations: a layer's bias b is its own, so the paper's second bias is no part of the weight.
"""

from dataclasses import replace

from torch import Tensor

from ...linalg import truncated_svd
from ...weights import Activated, Offset, Weight
from ...weights.activated import ACTIVATIONS
from ..limits import one_of
from ..registry import not_base, structure
from ..site import Basis, Factors, Site


@structure(
    "afm",
    title="Unified Low-rank Compression Framework for Click-through Rate Prediction",
    year=2024,
    arxiv="2405.18146",
    code="yuhao318/Atomic_Feature_Mimicking",
    formula="y = B f(A x + c) + b, E = B A + 1 m^T",
    start=not_base("that of the best rank-r part of every weight"),
    rank=128,
    layers=("linear", "embedding"),
    pairs="terms",
    sides=True,
    entries=True,
    scratch=True,
)
def afm(site: Site, rank: int, *, activation: str = "identity") -> Weight:
    """Return B f(A x + c), or B A + 1 m^T of a table.

    Args:
        site: the weight.
        rank: r, of the product.
        activation: f of linear layers, "identity", "relu", "gelu" or "silu"; tables have none.
    """
    one_of("afm", ("identity", *sorted(ACTIVATIONS)), activation=activation)
    mean = site.zeros(1, site.shape[1])
    if site.looked_up and not site.blank:
        mean = site.matrix().mean(0, keepdim=True)
    factors = _start(site, rank, mean)
    if activation == "identity" or site.looked_up:
        product = site.change(factors, 1.0)
        return product + Offset(site.trained(mean, "offset"), site.shape[0]) if site.looked_up else product
    up, down = site.trained(factors.up, "up"), site.trained(factors.down, "down")
    return Activated(up, down, activation, shift=site.trained(site.zeros(rank), "shift"))


def _start(site: Site, rank: int, mean: Tensor) -> Factors:
    if site.blank:
        return Factors(site.zeros(site.shape[0], rank), site.zeros(rank, site.shape[1]), "displaced")
    return replace(Basis(*truncated_svd(site.matrix() - mean, rank)).split(1.0), start="displaced")
