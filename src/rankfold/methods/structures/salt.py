"""SALT: scale and shift the leading singular values, add a low-rank matrix to the rest of the spectrum.

    W = U max(D, 0) V^T,   D = blockdiag(diag((1 + a) S_r + b), diag(S_q) + X Y)

Elsayed et al. 2025. U (out, k) and V^T (k, in), k = min(out, in), are frozen; a and b in R^r, X in R^{q x p}
and Y in R^{p x q}, q = k - r, train: 2 r + 2 p q numbers. The maximum acts on every entry of the core, as in
the official code, so the change of the tail has a rank above p in general, and an entry beside the diagonal
gets a gradient only while it is positive. p = 8, X Kaiming uniform (a = sqrt 20) and Y = 0 are the official
code's for SAM 2; r is a share of k, of which 0.5 is this package's choice. Start: the base, exactly.

The paper's loss has the term mu (||diag(a S_r + b)||_F + ||X Y||_F) per weight, norms and not squares. With
`mu` and `attach` its gradient is added to the loss's; its value is `spectral_penalty.penalty`. The official
code leaves mu to the configuration, so it is 0 here, off, by default.

Deviation: a starts at 0 where the code trains 1 + a, so weight decay pulls towards the base.
"""

import math

import torch

from ...errors import InvalidOption
from ...weights import Affine, Diagonal, Leaf, Rectified, Weight
from ..framed import framed
from ..registry import structure
from ..site import Basis, Site
from ..spectral_penalty import Penalty

RECTIFIED = ("all", "diagonal", "none")


@structure(
    "salt",
    title="SALT: Singular Value Adaptation with Low-Rank Transformation",
    year=2025,
    arxiv="2503.16055",
    code="BioMedIA-MBZUAI/SALT",
    formula="W = U max(blockdiag(diag((1 + a) S_r + b), diag(S_q) + X Y), 0) V^T",
    init="svd",
    starts=("frame",),
    training=Penalty,
)
def salt(site: Site, rank: int, *, ratio: float = 0.5, relu: str = "all", mu: float = 0.0) -> Weight:
    """Return W0 + U_r diag(change of the values) V_r^T + U_q (change of the tail) V_q^T.

    Args:
        site: the weight.
        rank: p, of the product that is added to the tail.
        ratio: share of the singular values that are scaled and shifted, in (0, 1]; at least one is.
        relu: which entries of the core may not become negative: "all", "diagonal" or "none".
        mu: weight of the regulariser in training, at least 0.
    """
    if not 0 < ratio <= 1 or relu not in RECTIFIED:
        raise InvalidOption(f"salt needs ratio in (0, 1] and relu in {RECTIFIED}, not {ratio} and {relu!r}")
    size = min(site.shape)
    top = max(1, int(ratio * size))
    basis = site.basis(size)
    leading = _part(basis, slice(top))
    values = site.frozen(leading.values, "values")
    scale, shift = (site.trained(site.zeros(top), name) for name in ("scale", "shift"))
    moved: Leaf = Affine(scale, values, shift, "moved")
    if relu != "none":
        moved = Rectified(values, moved, "rectified")
    weight = site.base + framed(site, leading, Diagonal(moved))
    return weight if top == size else weight + _tail(site, _part(basis, slice(top, None)), rank, relu)


def _part(basis: Basis, terms: slice) -> Basis:
    """Return some terms of a frame, their values not negative: pivots have signs, which go to the left."""
    values = basis.values[terms]
    return Basis(basis.left[:, terms] * torch.where(values < 0, -1, 1), values.abs(), basis.right[terms])


def _tail(site: Site, basis: Basis, rank: int, relu: str) -> Weight:
    """Return the term of the low-rank matrix in the rest of the spectrum."""
    size = len(basis.values)
    up = site.trained(site.uniform("up", size, rank, bound=math.sqrt(6 / (21 * rank))), "up")
    change: Weight = up @ site.trained(site.zeros(rank, size), "down")
    if relu != "none":
        values = site.frozen(basis.values, "rest.values")
        change = Rectified(values, change, "rest.rectified", everywhere=relu == "all")
    return framed(site, basis, change, prefix="rest.")
