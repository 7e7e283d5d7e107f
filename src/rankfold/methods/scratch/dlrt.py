"""DLRT: a weight of low rank that moves along its manifold, and finds its rank.

    W = U S V^T,   U (out, r), V (in, r) orthonormal,   S (r, r)
    K = U S - lr G V,   L = V S^T - lr G^T U,   Uh = orth [K | U],   Vh = orth [L | V]
    Sh = Uh^T U S V^T Vh - lr Uh^T G Vh,   cut to the smallest r with sqrt(sum_{i>r} d_i^2) <= tau ||d||

Schotthoefer et al. 2022, the rank-adaptive basis-update and Galerkin step. G is the gradient of W, which is
not formed, nor is W. d are the singular values of Sh, and U, S, V become what is left of its SVD, so S is
diagonal; 2 <= r <= min(out, in) / 2. tau = 0.1 is that of the authors' scripts (0.03 to 0.45 studied). Start:
U and V of a normal matrix's QR, S = diag of sorted |N(0, 1)|; or, with `start="svd"`, the best rank-r part of
W0. r = 128 is ours.

K, L and S move as the attached optimizer moves what has these gradients; with SGD that is the formula above.
With momentum or Adam, moments are turned with the bases, second moments by squared entries.

Deviations: one forward and backward for a step, where the official code takes three, of the same W each; so
inputs and gradients of outputs are held until the step, and the optimizer's own step runs a second time, for
S alone. Without the variant of fixed rank, whose third step needs a forward of its own. The official code
cuts with columns of Q^T in the place of rows, and leaves the last singular value out of the test; neither is
so here.
"""

import torch
from torch import Tensor

from ...linalg import truncated_svd
from ...weights import Spectral, Weight
from ..galerkin import Galerkin, largest
from ..limits import one_of
from ..registry import not_base, structure
from ..site import Site


@structure(
    "dlrt",
    title=(
        "Low-rank lottery tickets: finding efficient low-rank neural networks via matrix differential "
        "equations"
    ),
    year=2022,
    arxiv="2205.13571",
    code="COMPiLELab/DLRT-Net",
    formula="W = U S V^T; steps of K = U S and L = V S^T widen the bases, one of S in them, cut to tau",
    start=not_base("that of random weights of rank r"),
    rank=128,
    limit=largest,
    layers=("linear", "convolution"),
    scratch=True,
    training=Galerkin,
)
def dlrt(site: Site, rank: int, *, tau: float = 0.1, absolute: bool = False, start: str = "normal") -> Weight:
    """Return U S V^T.

    Args:
        site: the weight.
        rank: r to begin with.
        tau: how much of S a step may cut off, in its Frobenius norm.
        absolute: tau is that much itself, not a share of the norm of S.
        start: "normal" or "svd", as above.
    """
    one_of("dlrt", ("normal", "svd"), start=start)
    left, values, right = _normal(site, rank) if start == "normal" else _best(site, rank)
    core = site.trained(torch.diag(values), "core")
    return Spectral(site.trained(left, "left"), core, site.trained(right, "right"))


def _normal(site: Site, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    left, right = (site.orthonormal(f"side{i}", side, rank) for i, side in enumerate(site.shape))
    return left, site.normal("core", rank).abs().sort(descending=True).values, right.T


def _best(site: Site, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if site.blank:
        return site.zeros(site.shape[0], rank), site.zeros(rank), site.zeros(rank, site.shape[1])
    return truncated_svd(site.matrix(), rank)
