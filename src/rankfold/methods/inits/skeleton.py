"""The skeleton (CUR) approximation of the weight: the best one between some of its columns and rows.

    W0 ~ C K R,   C = W0[:, J],   R = W0[I],   K = C^+ W0 R^+ = argmin ||W0 - C K R||_F

Goreinov, Tyrtyshnikov and Zamarashkin 1997; the frame of PMSS (2024). left = C (out, r) and right = R (r, in)
are columns and rows of W0, bit for bit; middle = K (r, r) stands between them, and values are ones. The
approximation is the projection of W0 on the span of C and the span of R, W0 itself where both have its rank;
no K errs less. I and J are chosen by `select`:

    pivoted     the pivots of QR decompositions, of W0 for J and of C^T for I (the error is in practice a
                small multiple of the singular value decomposition's, and W0[I, J] is well conditioned)
    leverage    the rows and columns with the largest part in the r leading singular subspaces
    norms       the longest rows and columns
    random      drawn by the seed, without repetition

A structure that takes a frame trains between C and R. As factors, B0 A0 = C K R / s is split evenly over its
singular values.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...linalg import skeleton as approximation
from ...linalg import truncated_svd
from ..limits import one_of
from ..registry import init, near_base
from ..site import Basis, Site

Lines = tuple[Tensor | None, Tensor | None]  # rows and columns; None leaves the choice to the pivots


def _leverage(site: Site, matrix: Tensor, rank: int) -> Lines:
    left, _, right = truncated_svd(matrix, rank)
    return _largest(left.square().sum(1), rank), _largest(right.square().sum(0), rank)


def _norms(site: Site, matrix: Tensor, rank: int) -> Lines:
    return _largest(matrix.norm(dim=1), rank), _largest(matrix.norm(dim=0), rank)


def _random(site: Site, matrix: Tensor, rank: int) -> Lines:
    generator = site.generator("skeleton")
    rows, columns = (torch.randperm(size, generator=generator)[:rank] for size in matrix.shape)
    return rows, columns


def _largest(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count]


SELECTIONS: dict[str, Callable[[Site, Tensor, int], Lines]] = {
    "pivoted": lambda site, matrix, rank: (None, None),
    "leverage": _leverage,
    "norms": _norms,
    "random": _random,
}


@init(
    "skeleton",
    gives=("frame", "residual"),
    title="A theory of pseudoskeleton approximations",
    year=1997,
    formula="W0 ~ C (C^+ W0 R^+) R, C = W0[:, J], R = W0[I]",
    start=near_base(1e-4),
)
def skeleton(site: Site, rank: int, scaling: float, *, select: str = "pivoted") -> Basis:
    """Return columns and rows of the weight, and what belongs between them.

    Args:
        site: the weight.
        rank: number of columns and of rows.
        scaling: not used; the split into factors divides by it.
        select: pivoted, leverage, norms or random.
    """
    one_of("skeleton", SELECTIONS, select=select)
    matrix = site.matrix()
    rows, columns = SELECTIONS[select](site, matrix, rank)
    found = approximation(matrix, rank, rows=rows, columns=columns)
    return Basis(found.left, torch.ones_like(found.core[0]), found.right, middle=found.core)
