"""Bases of one side of a gradient: how they are chosen, and how a gradient meets them.

A gradient is seen as G (d, n) with the projected side first. A basis P (d, r) takes it to `down = P^T G`,
(r, n), and back, `up = P N`, (d, n). What a basis is made of is a dict of tensors, part of the optimizer's
state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import truncated_svd

Kept = dict[str, Tensor]


class Projector:
    """How the basis of a gradient is chosen: here, its leading singular vectors, exactly (GaLore).

    Attributes:
        orthonormal: its columns always are.
    """

    orthonormal: ClassVar[bool] = True

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

    def add_up(
        self, weight: Tensor, inner: Tensor, kept: Kept, like: Tensor, factor: float, left: bool
    ) -> None:
        """Add `factor * up(inner)` to a weight in place: (d, n) where left, else its transpose (n, d)."""
        basis = self.matrix(kept, like)
        weight.addmm_(*((basis, inner) if left else (inner.T, basis.T)), alpha=factor)

    def stepped(self, gradient: Tensor, kept: Kept, share: float) -> None:
        """Act after `up`; share is the learning rate over the one at the beginning."""


@dataclass(frozen=True)
class Randomized(Projector):
    """The leading singular vectors within a range that is found from the last basis and some random columns.

    Args:
        oversampling: random columns beside the last basis, or beside as many random ones at first.
        iterations: further power iterations.
    """

    oversampling: int = 8
    iterations: int = 1

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the basis (d, r)."""
        old = kept.get("basis")
        fresh = self.oversampling + (0 if old is not None else rank)
        test = torch.randn(len(gradient), fresh, generator=generator).to(gradient)
        start = test if old is None else torch.cat([old.to(gradient.dtype), test], 1)
        found = start[:, : min(gradient.shape)]
        for _ in range(1 + self.iterations):
            found = torch.linalg.qr(gradient @ torch.linalg.qr(gradient.T @ found).Q).Q
        # The Gram matrix of the small side is enough to turn the range; its small end is not used.
        small = found.T @ gradient
        turn = torch.linalg.eigh(small @ small.T).eigenvectors.flip(1)
        return {"basis": found @ turn[:, :rank]}


@dataclass(frozen=True)
class Sampled(Projector):
    """Singular vectors drawn without replacement, each as likely as its singular value is large (SARA)."""

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the basis (d, r)."""
        left, values, _ = torch.linalg.svd(gradient, full_matrices=False)
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
        return gradient[kept["indices"].long()]

    def up(self, inner: Tensor, kept: Kept, like: Tensor) -> Tensor:
        """Put the rows back, (d, n)."""
        return torch.zeros_like(like).index_copy_(0, kept["indices"].long(), inner)

    def add_up(
        self, weight: Tensor, inner: Tensor, kept: Kept, like: Tensor, factor: float, left: bool
    ) -> None:
        """Add to the chosen rows or columns alone."""
        added = inner if left else inner.T
        weight.index_add_(0 if left else 1, kept["indices"].long(), added, alpha=factor)


@lru_cache(maxsize=32)
def cosines(size: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
    """Return the orthonormal DCT-II matrix C (d, d): row k is a cosine of frequency k; one for all who ask.

    Example:
        >>> matrix = cosines(5)
        >>> bool(torch.allclose(matrix @ matrix.T, torch.eye(5, dtype=torch.float64)))
        True
    """
    place = torch.arange(size, dtype=torch.float64)
    matrix: Tensor = torch.cos(torch.pi / size * place[:, None] * (place + 0.5)) * math.sqrt(2 / size)
    matrix[0] *= 0.5**0.5
    return matrix.to(device, dtype)


@dataclass(frozen=True)
class Cosines(Projector):
    """The r cosines of a discrete cosine transform along which the gradient is largest; indices are kept.

    Args:
        norm: "l2", the best choice of all, or "l1".
    """

    norm: str = "l2"

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the frequencies (r,), increasing."""
        turned = self._all(gradient) @ gradient
        scores = turned.square().sum(1) if self.norm == "l2" else turned.abs().sum(1)
        return {"indices": scores.topk(rank).indices.sort().values.to(torch.int32)}

    def matrix(self, kept: Kept, like: Tensor) -> Tensor:
        """Return the chosen cosines, (d, r)."""
        chosen: Tensor = self._all(like)[kept["indices"].long()]
        return chosen.T

    def _all(self, like: Tensor) -> Tensor:
        matrix: Tensor = cosines(len(like), like.dtype, like.device)
        return matrix


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

    def stepped(self, gradient: Tensor, kept: Kept, share: float) -> None:
        """Move the basis."""
        size = gradient.norm()
        if not float(size):
            return
        unit, basis = gradient / size, kept["basis"].to(gradient.dtype)
        turned = unit @ (unit.T @ basis)
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
    """

    heads: int = 1

    def fit(self, gradient: Tensor, rank: int, kept: Kept, generator: torch.Generator) -> Kept:
        """Return the basis (d, r) of a head drawn at random."""
        head = int(torch.randint(self.heads, (), generator=generator))
        part = gradient.chunk(self.heads, 1)[head]
        return {"basis": truncated_svd(part, rank, iterations=2, generator=generator)[0]}


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
