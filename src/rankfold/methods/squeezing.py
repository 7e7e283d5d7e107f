"""The terms of a product of two factors, by what they are worth, and how many of them are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidOption, InvalidRank
from ..linalg import RootGram, allocate, squeeze_factors, tail_errors, weighted_low_rank
from ..linalg.checks import precise_dtype

SHARES = ("uniform", "error")


@dataclass(frozen=True, eq=False)
class Cut:
    """A product B A at a smaller rank, and how it came from the old factors.

        B' = B M,   A' = N A,   dB' = dB N^T,   dA' = M^T dA

    Attributes:
        up: B' (m, r).
        down: A' (r, n).
        up_map: M (k, r).
        down_map: N (r, k).
    """

    up: Tensor
    down: Tensor
    up_map: Tensor
    down_map: Tensor

    @property
    def rank(self) -> int:
        """Return r."""
        return self.up.shape[1]

    def kept(self, alive: Tensor) -> Cut:
        """Return the terms of a mask (r,) or a slice."""
        return Cut(self.up[:, alive], self.down[alive], self.up_map[:, alive], self.down_map[alive])

    def after(self, earlier: Cut) -> Cut:
        """Return this cut of a cut as one."""
        return Cut(self.up, self.down, earlier.up_map @ self.up_map, self.down_map @ earlier.down_map)


@dataclass(frozen=True, eq=False)
class Terms:
    """All terms of a product B A, the first r of which are its best approximation of rank r, for every r.

    Attributes:
        factors: B (m, k) and A (k, n).
        cut: the terms.
        spectrum: what they are worth, S (c,): r of them leave the error sqrt(sum over i > r of S_i^2).
        balanced: B'^T B' = A' A'^T holds for the first r of them, whatever r.
    """

    factors: tuple[Tensor, Tensor]
    cut: Cut
    spectrum: Tensor
    balanced: bool

    @property
    def rank(self) -> int:
        """Return k, the inner dimension of the factors."""
        return self.factors[0].shape[1]

    def error(self, rank: int) -> float:
        """Return the error of so many terms, relative to that of none, in 0..1."""
        errors = tail_errors(self.spectrum.double())
        return float(errors[min(rank, len(self.spectrum))] / errors[0]) if errors[0] > 0 else 0.0

    def at(self, rank: int) -> Cut:
        """Return the best approximation of a rank, balanced; of terms that are zero at most one is kept."""
        cut = self.cut.kept(torch.arange(min(rank, self.cut.rank), device=self.cut.up.device))
        cut = cut if self.balanced else _balanced(cut)
        up, down = self.factors
        noise = torch.finfo(cut.up.dtype).eps * max(*up.shape, *down.shape)
        level = noise * torch.linalg.matrix_norm(up) * torch.linalg.matrix_norm(down)
        alive = cut.up.square().sum(0) > level  # of balanced factors the squares are the singular values
        return cut.kept(alive) if bool(alive.any()) else self._nothing()

    def keep(self, rank: int | None) -> tuple[Cut, float]:
        """Return a rank and its error; None, or one that is not smaller, keeps the factors bit for bit."""
        if rank is None or rank >= self.rank:
            return self.unchanged(), 0.0
        return self.at(rank), self.error(rank)

    def unchanged(self) -> Cut:
        """Return the factors as they are, without terms of which a factor is zero, but for one."""
        up, down = self.factors
        alive = (up.abs().sum(0) > 0) & (down.abs().sum(1) > 0)
        same = torch.eye(self.rank, dtype=self.cut.up_map.dtype, device=up.device)
        return Cut(up, down, same, same).kept(alive) if bool(alive.any()) else self._nothing()

    def _nothing(self) -> Cut:
        """Return one term that is zero and can train."""
        up, down = self.factors
        first = torch.eye(1, self.rank, dtype=self.cut.up_map.dtype, device=up.device)
        return Cut(torch.zeros_like(up[:, :1]), down[:1], torch.zeros_like(first.mT), first)


def terms_of(up: Tensor, down: Tensor, gram: Tensor | None = None, most: int | None = None) -> Terms:
    """Return the terms of a product `B A`, without forming it.

        no Gram matrix:  B A = U S V^T,   B' = U S^(1/2),   A' = S^(1/2) V^T
        else:            B A C^(1/2) = U S V^T,   X_r = U_r U_r^T B A,   smallest ||(B A - X_r) C^(1/2)||_F

    With A^T = Q R the latter is ||(B R^T - U_r N) K^(1/2)||_F with K = Q^T C Q, a matrix of the size of the
    rank: no root of C is taken.

    Args:
        up: B (m, k).
        down: A (k, n).
        gram: C (n, n), the mean of x x^T over inputs x.
        most: number of terms that are asked for at most; None is all.
    """
    size = min(*up.shape, *down.shape)
    if gram is None:
        plain = squeeze_factors(up, down, size if most is None else min(most, size))
        return Terms(
            (up, down), Cut(plain.up, plain.down, plain.up_map, plain.down_map), plain.values, balanced=True
        )
    dtype = precise_dtype(up)
    tall, wide = up.to(dtype), down.to(dtype)
    basis, triangle = torch.linalg.qr(wide.mT)
    small = basis.mT @ gram.to(basis) @ basis
    near = weighted_low_rank((tall, triangle.mT), size, right=RootGram(small))
    tall = tall * (wide.abs().sum(1) > 0)  # so that M is zero where A is
    left, middle = torch.linalg.qr(tall)
    up_map = torch.linalg.pinv(middle) @ (left.mT @ near.up)  # U_r lies in the range of B
    cut = Cut(near.up, near.down @ basis.mT, up_map, near.up.mT @ tall)
    return Terms((up, down), cut, near.spectrum, balanced=False)


def _balanced(cut: Cut) -> Cut:
    inner = squeeze_factors(cut.up, cut.down, cut.rank)
    return Cut(inner.up, inner.down, inner.up_map, inner.down_map).after(cut)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How many terms products keep.

    Args:
        rank: of each, or on average.
        energy: share of the squares that each keeps.
        max_error: relative error of each, sqrt(1 - energy).
        share: "uniform", or "error" for a rank that is an average.

    Raises:
        InvalidRank: the rank is no whole number of at least 1.
        InvalidOption: two are given, or one is out of range.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    share: str = "uniform"

    def __post_init__(self) -> None:
        """Check the options."""
        given = {"rank": self.rank, "energy": self.energy, "max_error": self.max_error}
        chosen = [f"{name}=" for name, value in given.items() if value is not None]
        if len(chosen) > 1:
            raise InvalidOption(f"{' and '.join(chosen)} each choose the rank; pass one of them")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise InvalidRank(f"rank must be a whole number of at least 1, not {self.rank!r}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InvalidOption(f"energy must lie in (0, 1], not {self.energy}")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise InvalidOption(f"max_error must lie between 0 and 1, not {self.max_error}")
        if self.share not in SHARES:
            raise InvalidOption(f"share must be one of {', '.join(SHARES)}, not {self.share!r}")
        if self.share != "uniform" and self.rank is None:
            raise InvalidOption(f"share={self.share!r} shares out a rank; pass rank=, the average")

    @property
    def approximates(self) -> bool:
        """Whether anything is chosen; else only zero terms are dropped."""
        return (self.rank, self.energy, self.max_error) != (None, None, None)

    @property
    def most(self) -> int | None:
        """The number of terms that no product exceeds, or None."""
        return self.rank if self.share == "uniform" else None

    def ranks(self, spectra: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[int]:
        """Return how many terms every product keeps, at least 1.

            share="error":  least sum of squared errors, with sum of r_i (m_i + n_i) at most that of `rank`,

        by greedy steps, which is the least up to what remains of the budget, and never above that of `rank`
        for each.

        Args:
            spectra: what the terms are worth, S (c,) of each.
            shapes: (m, n) of each.
        """
        if self.rank is None:
            energy = 1 - self.max_error**2 if self.max_error is not None else self.energy
            return [_enough(spectrum, 1.0 if energy is None else energy) for spectrum in spectra]
        uniform = [min(self.rank, len(spectrum)) for spectrum in spectra]
        if self.share == "uniform":
            return uniform
        prices = [sum(shape) for shape in shapes]
        budget = sum(rank * price for rank, price in zip(uniform, prices, strict=True))
        costs = [
            [rank * price for rank in range(len(s) + 1)] for s, price in zip(spectra, prices, strict=True)
        ]
        gains = [_gains(spectrum) for spectrum in spectra]
        shared = allocate(costs, gains, budget, minimum=1)
        return max(uniform, shared, key=lambda ranks: sum(g[r] for g, r in zip(gains, ranks, strict=True)))


def _enough(spectrum: Tensor, energy: float) -> int:
    """Return the smallest rank, at least 1, that keeps a share of the squares, to rounding."""
    rest = tail_errors(spectrum.double()).square()
    rounding = (len(spectrum) * torch.finfo(spectrum.dtype).eps) ** 2
    return max(1, int((rest > (1 - energy + rounding) * rest[0]).sum()))


def _gains(spectrum: Tensor) -> list[float]:
    squares = spectrum.double().cpu().square().cumsum(0).tolist()
    return [0.0, *squares]


@dataclass
class SqueezeReport:
    """What a squeeze did.

    Attributes:
        rows: per weight: its path `weight`, its rank `before` and `after`, and the relative `error`.
        weighted: whether errors are those of the outputs on calibration data, relative to the outputs of the
            change; else they are relative Frobenius errors of the change.
        path: what was written, or "".
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    weighted: bool = False
    path: str = ""

    @property
    def largest_error(self) -> float:
        """The largest relative error of a weight's change."""
        return max((row["error"] for row in self.rows), default=0.0)

    def fill(self, rows: Mapping[str, tuple[int, int, float]], *, weighted: bool, path: str = "") -> None:
        """Take in rank before, rank after and error of every weight."""
        self.rows = [
            {"weight": weight, "before": before, "after": after, "error": error}
            for weight, (before, after, error) in rows.items()
        ]
        self.weighted, self.path = weighted, path

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"path": self.path, "weighted": self.weighted, "rows": self.rows}

    def __str__(self) -> str:
        """Return a table with one line a weight."""
        kind = "of the outputs" if self.weighted else "of the change"
        width = max(len(word) for word in ("weight", *(row["weight"] for row in self.rows)))
        head = f"  {'weight':<{width}}  rank before  after      error"
        lines = [
            f"  {row['weight']:<{width}}  {row['before']:>11}  {row['after']:>5}  {row['error']:>9.3g}"
            for row in self.rows
        ]
        where = f", written to {self.path}" if self.path else ""
        count = f"{len(self.rows)} weight{'s' * (len(self.rows) != 1)}"
        total = f"{count}, largest relative error {kind} {self.largest_error:.3g}{where}"
        return "\n".join([total, head, *lines])
