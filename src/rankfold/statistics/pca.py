"""Incremental principal components of activations, corrected for the moving mean.

    Y = [ diag(S) V^T ; X - mean(X) ; sqrt(M n / (M + n)) (mean - mean(X)) ] = U S' V'^T,  keep k

Ross et al. 2008, "Incremental Learning for Robust Visual Tracking". With k = in nothing is lost and the
result is the decomposition of all centred rows; with fewer components, what one batch drops cannot return.
Two results merge by stacking their diag(S) V^T in the same way, so partial passes add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidOption
from ..linalg import truncated_svd
from .reducers import Reducer, Seen, number, reducer, whole


@dataclass(frozen=True)
class PrincipalComponents:
    """Principal components of the rows that a weight met.

    Attributes:
        mean: (in,).
        values: (k,) singular values of the centred rows, falling.
        components: (k, in), orthonormal rows; the largest entry of each is positive.
        variance: (in,) variance of every feature over all rows, whether or not components hold it.
        count: number of rows.
        agreement: (k,) |cos| between every component before and after the last update.
        tolerance: the agreement from which a component counts as converged.
    """

    mean: Tensor
    values: Tensor
    components: Tensor
    variance: Tensor
    count: int
    agreement: Tensor
    tolerance: float

    @property
    def converged(self) -> bool:
        """Whether every component kept its direction in the last update."""
        return bool((self.agreement >= self.tolerance).all())

    @property
    def explained(self) -> Tensor:
        """Share of the total variance that each component explains, (k,); zeros where there is none."""
        total = self.count * self.variance.sum()
        return self.values.square() / torch.where(total == 0, 1, total)


@dataclass(frozen=True)
class _Part:
    """Rows in short: what can be stacked with another such part."""

    mean: Tensor
    spread: Tensor  # (n, in), centred rows or diag(S) V^T
    squares: Tensor  # (in,), summed squared deviations
    count: int


@reducer("input_pca")
class InputPca(Reducer):
    """Leading principal components of the inputs, centred.

    Args:
        components: k, how many are kept, at most `in`.
        tolerance: |cos| between successive directions from which a component counts as converged.
        iterations: power iterations of the randomised decomposition of each update; 4 as in EVA (Paischer et
            al. 2024). None takes the exact one, as does every update of so few rows or features that the
            randomised one would save nothing.
    """

    side = "input"

    def __init__(self, *, components: int, tolerance: float = 0.99, iterations: int | None = 4) -> None:
        super().__init__()
        if not whole(components, 1):
            raise InvalidOption(f"input_pca: components must be a whole number from 1, not {components!r}")
        if not 0 < tolerance <= 1:
            raise InvalidOption(f"input_pca: tolerance must be in (0, 1], not {tolerance!r}")
        if iterations is not None and not whole(iterations, 0):
            raise InvalidOption(f"input_pca: iterations must be None or from 0, not {iterations!r}")
        self.components, self.tolerance, self.iterations = components, tolerance, iterations

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is kept."""
        return {
            "mean": (columns,), "values": (-1,), "components": (-1, columns), "squares": (columns,),
            "count": (), "agreement": (-1,),
        }  # fmt: skip

    def update(self, seen: Seen) -> None:
        """Take in the rows of one call, however few."""
        values = seen.rows.values
        if len(values):
            mean = values.mean(0)
            centred = values - mean
            self._take(_Part(mean, centred, centred.square().sum(0), len(values)))

    def merge(self, other: Reducer) -> None:
        """Take in the components of another part of the pass."""
        if not self.sums:
            self.sums = {key: value.clone() for key, value in other.sums.items()}
        elif other.sums:
            self._take(_part(other.sums))

    def _take(self, new: _Part) -> None:
        """Stack what is there with something new, and decompose it."""
        known, old = _part(self.sums) if self.sums else None, self.sums.get("components")
        both = new if known is None else _stacked(known, new)
        values, components = self._decompose(both.spread)
        self.sums = {
            "mean": both.mean, "values": values, "components": components, "squares": both.squares,
            "count": number(both.count), "agreement": _agreement(old, components),
        }  # fmt: skip

    def _decompose(self, spread: Tensor) -> tuple[Tensor, Tensor]:
        rank = min(self.components, *spread.shape)
        saves = rank + max(10, rank) < min(spread.shape)
        generator = torch.Generator().manual_seed(0)
        _, values, components = truncated_svd(
            spread, rank, iterations=self.iterations if saves else None, generator=generator
        )
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        # contiguous, as from a file: products of another layout round in another way
        return values, (components * torch.where(largest < 0, -1, 1)).contiguous()

    def value(self, batches: int) -> PrincipalComponents:
        """Return the components."""
        sums, count = self.sums, int(self.sums["count"])
        return PrincipalComponents(
            sums["mean"], sums["values"], sums["components"], sums["squares"] / count, count,
            sums["agreement"], self.tolerance,
        )  # fmt: skip


def _part(sums: dict[str, Tensor]) -> _Part:
    spread = sums["values"][:, None] * sums["components"]
    return _Part(sums["mean"], spread, sums["squares"], int(sums["count"]))


def _stacked(first: _Part, second: _Part) -> _Part:
    """Join two parts: their means differ, which is one more row."""
    device, dtype = second.mean.device, second.mean.dtype
    mean, spread = first.mean.to(device, dtype), first.spread.to(device, dtype)
    count = first.count + second.count
    apart = (first.count * second.count / count) ** 0.5 * (mean - second.mean)
    return _Part(
        mean + (second.mean - mean) * (second.count / count),
        torch.cat([spread, second.spread, apart[None]]),
        first.squares.to(device, dtype) + second.squares + apart.square(),
        count,
    )


def _agreement(old: Tensor | None, new: Tensor) -> Tensor:
    """Return |cos| between components and their predecessors; 0 where there is none."""
    cosines = new.new_zeros(len(new))
    if old is not None:
        count = min(len(old), len(new))
        cosines[:count] = (old[:count].to(new) * new[:count]).sum(1).abs()
    return cosines
