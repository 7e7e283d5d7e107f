"""Bases of one side of a gradient: how they are chosen, and how a gradient meets them.

A gradient is seen as G (d, n) with the projected side first. A basis P (d, r) takes it to `down = P^T G`,
(r, n), and back, `up = P N`, (d, n). What a basis is made of is a dict of tensors, part of the optimizer's
state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import truncated_svd
from .frequencies import cosine_scores, cosines

Kept = dict[str, Tensor]


class Projector:
    """How the basis of a gradient is chosen: here, its leading singular vectors, exactly (GaLore).

    Attributes:
        orthonormal: its columns always are.
        columnwise: nothing but the choice of a basis looks across columns of G.
    """

    orthonormal: ClassVar[bool] = True
    columnwise: ClassVar[bool] = True

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return what a new basis is made of.

        Args:
            gradient: G (d, n), float32 or float64.
            rank: r, at most d and n.
            kept: of the last basis; empty at first.
            generator: on the CPU, alike in every process.
        """
        return {"basis": truncated_svd(gradient, rank)[0]}

    def matrix(self, kept: Kept, like: Tensor) -> Tensor:
        """Return P (d, r) for gradients like G (d, n)."""
        return kept["basis"].to(like.dtype)

    def down(self, gradient: Tensor, kept: Kept) -> Tensor:
        """Return P^T G, (r, n)."""
        return self.matrix(kept, gradient).T @ gradient

    def up(self, inner: Tensor, kept: Kept, like: Tensor) -> Tensor:
        """Return P N, (d, n)."""
        return self.matrix(kept, like) @ inner

    def add_up(self, target: Tensor, inner: Tensor, kept: Kept, factor: float = 1.0) -> None:
        """Add `factor * up(inner)` to a matrix (d, n) in place."""
        target.addmm_(self.matrix(kept, target), inner, alpha=factor)

    def rest(self, gradient: Tensor, low: Tensor, kept: Kept) -> Tensor:
        """Return E = G - up(R), laid out in memory as G is."""
        rest = gradient.clone()
        self.add_up(rest, low, kept, -1.0)
        return rest

    def shared(self, new: Kept, old: Kept, like: Tensor) -> Tensor:
        """Return P_new^T P_old, (r, r)."""
        return self.matrix(new, like).T @ self.matrix(old, like)

    def stepped(self, gradient: Tensor, low: Tensor, kept: Kept, share: float) -> None:
        """Act after a step; share is the learning rate over the one at the beginning."""


@dataclass(frozen=True)
class Randomized(Projector):
    """The leading singular vectors within a range that is found from the last basis and some random columns.

        Z = qr(G^T [P_old, Omega]),   P = the leading left singular vectors of G Z

    Args:
        oversampling: random columns beside the last basis, or beside as many random ones at first.
        iterations: power iterations before, when there is no basis yet to start from.
    """

    oversampling: int = 8
    iterations: int = 1

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the basis (d, r); with the last one to start from, signs are those that it has."""
        old, most = kept.get("basis"), min(gradient.shape)
        fresh = torch.randn(len(gradient), self.oversampling + rank * (old is None), generator=generator)
        start = fresh.to(gradient)
        if old is not None:
            old = old.to(gradient.dtype)
            start = torch.cat([old, start - old @ (old.T @ start)], 1)
        start = start[:, :most]
        for _ in range(self.iterations if old is None else 0):
            start = _span(gradient @ _span(gradient.T @ start))
        found = gradient @ _span(gradient.T @ start)
        turn = torch.linalg.eigh(found.T @ found).eigenvectors.flip(1)  # its small end is not used
        basis = _span(found @ turn[:, :rank])
        if old is not None:
            basis = basis * torch.where((basis * old).sum(0) < 0, -1, 1)
        return {"basis": basis}


def _span(columns: Tensor) -> Tensor:
    found: Tensor = torch.linalg.qr(columns).Q
    return found


@dataclass(frozen=True)
class Sampled(Projector):
    """Singular vectors drawn without replacement, each as likely as its singular value is large (SARA)."""

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the basis (d, r)."""
        left, values, _ = truncated_svd(gradient, min(gradient.shape))
        weights = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        floor = torch.finfo(torch.float32).eps  # so that there are enough of them to draw from
        drawn = torch.multinomial(weights.cpu().clamp_min(floor), rank, generator=generator)
        return {"basis": left[:, drawn.sort().values.to(left.device)]}


@dataclass(frozen=True)
class Gaussian(Projector):
    """Normal numbers of variance 1 / r, drawn again from a seed whenever they are met (Flora).

    Not orthonormal: `up(down(G))` is G in the mean.
    """

    orthonormal = False

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the seed and the rank."""
        seed = torch.randint(2**62, (), generator=generator)
        return {"seed": seed, "columns": torch.tensor(rank)}

    def matrix(self, kept: Kept, like: Tensor) -> Tensor:
        """Draw P (d, r)."""
        generator, columns = torch.Generator().manual_seed(int(kept["seed"])), int(kept["columns"])
        drawn: Tensor = torch.randn(len(like), columns, generator=generator) / columns**0.5
        return drawn.to(like)


@dataclass(frozen=True)
class Orthonormal(Projector):
    """A random orthonormal basis."""

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the basis (d, r)."""
        drawn = torch.randn(len(gradient), rank, generator=generator)
        return {"basis": torch.linalg.qr(drawn).Q.to(gradient)}


@dataclass(frozen=True)
class Coordinates(Projector):
    """Random rows of G itself: nothing is multiplied, and what is left out has no entry in common."""

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the rows (r,), increasing."""
        rows = torch.randperm(len(gradient), generator=generator)[:rank].sort().values
        return {"indices": rows.to(gradient.device, torch.int32)}

    def matrix(self, kept: Kept, like: Tensor) -> Tensor:
        """Return columns of the identity, (d, r)."""
        identity: Tensor = torch.eye(len(like), dtype=like.dtype, device=like.device)
        return identity[:, kept["indices"].long()]

    def down(self, gradient: Tensor, kept: Kept) -> Tensor:
        """Return the rows, (r, n)."""
        return _rows(gradient, kept["indices"])

    def up(self, inner: Tensor, kept: Kept, like: Tensor) -> Tensor:
        """Put the rows back, (d, n)."""
        return torch.zeros_like(like).index_copy_(0, kept["indices"].long(), inner)

    def add_up(self, target: Tensor, inner: Tensor, kept: Kept, factor: float = 1.0) -> None:
        """Add to the chosen rows alone."""
        stored, axis = as_stored(target)
        stored.index_add_(axis, kept["indices"], inner.T if axis else inner, alpha=factor)

    def rest(self, gradient: Tensor, low: Tensor, kept: Kept) -> Tensor:
        """Return G without the chosen rows."""
        rest = gradient.clone()
        stored, axis = as_stored(rest)
        stored.index_fill_(axis, kept["indices"].long(), 0)
        return rest

    def shared(self, new: Kept, old: Kept, like: Tensor) -> Tensor:
        """Return which rows are the same, (r, r)."""
        return _same(new, old, like)


def as_stored(matrix: Tensor) -> tuple[Tensor, int]:
    """Return a matrix as its rows lie in memory, and the axis that its rows are there."""
    turned = matrix.stride(0) == 1 and matrix.stride(1) != 1
    return (matrix.T, 1) if turned else (matrix, 0)


def _rows(matrix: Tensor, indices: Tensor) -> Tensor:
    stored, axis = as_stored(matrix)
    found = stored.index_select(axis, indices)
    return found.T.contiguous() if axis else found


def _same(new: Kept, old: Kept, like: Tensor) -> Tensor:
    return (new["indices"][:, None] == old["indices"]).to(like.dtype)


@dataclass(frozen=True)
class Cosines(Projector):
    """The r cosines of a discrete cosine transform along which the gradient is largest; indices are kept.

    Args:
        norm: "l2", the best choice of all, or "l1".
    """

    norm: str = "l2"

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the frequencies (r,), increasing."""
        scores = cosine_scores(gradient, self.norm)
        return {"indices": scores.topk(rank).indices.sort().values.to(torch.int32)}

    def matrix(self, kept: Kept, like: Tensor) -> Tensor:
        """Return the chosen cosines, (d, r)."""
        all_of_them: Tensor = cosines(len(like), like.dtype, like.device)
        return all_of_them.index_select(0, kept["indices"]).T

    def shared(self, new: Kept, old: Kept, like: Tensor) -> Tensor:
        """Return which frequencies are the same, (r, r)."""
        return _same(new, old, like)


@dataclass(frozen=True)
class OnlinePCA(Projector):
    """A basis that takes a gradient step on `||G - P P^T G||^2` after every step of the optimizer.

    Args:
        rate: of that step, for a gradient of norm 1; it falls as the learning rate does.
        every: steps between two QR decompositions of the basis, or 0 for none.
    """

    rate: float = 0.1
    every: int = 0
    orthonormal = False
    columnwise = False

    def stepped(self, gradient: Tensor, low: Tensor, kept: Kept, share: float) -> None:
        """Move the basis, by R = P^T G, which saves one of the two products of G G^T P."""
        size = gradient.norm()
        if not float(size):
            return
        basis = kept["basis"].to(gradient.dtype)
        turned = gradient @ low.T / size.square()
        slope = 2 * (basis @ (basis.T @ turned) + turned @ (basis.T @ basis)) - 4 * turned
        basis = basis - self.rate * share * slope
        count = kept.setdefault("moves", torch.zeros((), dtype=torch.int64)).add_(1)
        if self.every and int(count) % self.every == 0:
            basis = torch.linalg.qr(basis).Q
        kept["basis"] = basis.to(kept["basis"].dtype)


@dataclass(frozen=True)
class CrossHead(Projector):
    """One head's leading singular vectors for all heads of an attention's weight (GaLore+).

    Rows of the weight are heads one below the other, so the weight is projected on its input side
    (`side="right"`).

    Args:
        heads: how many.
        finder: how the basis of one head is found.
    """

    heads: int = 1
    finder: Projector = Randomized(iterations=2)

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the basis (d, r) of a head drawn at random."""
        head = int(torch.randint(self.heads, (), generator=generator))
        return self.finder.fit(gradient.chunk(self.heads, 1)[head], rank, kept, generator)


PROJECTORS: dict[str, Projector] = {
    "svd": Projector(),
    "randomized": Randomized(),
    "sampled": Sampled(),
    "gaussian": Gaussian(),
    "orthonormal": Orthonormal(),
    "coordinates": Coordinates(),
    "dct": Cosines(),
    "online-pca": OnlinePCA(),
}
