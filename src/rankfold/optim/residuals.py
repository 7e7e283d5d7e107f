"""What a projected optimizer does with the part of a gradient that its basis leaves out, E = G - P P^T G."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .inner import Adam, State
from .projectors import Coordinates, Kept, Projector, as_stored

_SMALL = 1e-8
_CACHED = 2**16  # entries
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Split:
    """A projected gradient in one step.

    Attributes:
        gradient: G (d, n).
        low: R = P^T G (r, n).
        inner: the inner optimizer's direction N (r, n).
        factor: that belongs to N.
        step: number of steps since the inner optimizer began, from 1.
        state: of the weight.
        projector: whose basis `kept` is.
        kept: what the basis is made of.
        total: sums over processes that hold other columns.
    """

    gradient: Tensor
    low: Tensor
    inner: Tensor
    factor: float
    step: int
    state: State
    projector: Projector
    kept: Kept
    total: Callable[[Tensor], Tensor]

    def rest(self) -> Tensor:
        """Return E (d, n)."""
        return self.projector.rest(self.gradient, self.low, self.kept)


class Residual:
    """Leaves the rest out (GaLore).

    Attributes:
        columnwise: columns of the rest are treated one by one, or by sums that `total` completes.
    """

    columnwise: ClassVar[bool] = True

    def add(self, target: Tensor, split: Split, rate: float) -> Tensor | None:
        """Subtract what becomes of the rest from the weight, times the rate, in place.

        Args:
            target: the weight (d, n).
            split: of its gradient.
            rate: learning rate.

        Returns:
            What is to come back from the low rank beside N, (r, n), or None.
        """
        return None


@dataclass(frozen=True)
class Scaled(Residual):
    """Scales the rest as the inner optimizer scaled what was kept, column by column (Fira).

        S = E phi,   phi_j = |N_j| / |R_j|,   |S_t| <= growth |S_{t-1}|

    Args:
        growth: most that the norm may grow in a step; infinity does not limit it.
    """

    growth: float = 1.01

    def add(self, target: Tensor, split: Split, rate: float) -> Tensor | None:
        """Subtract S, with the inner optimizer's factor; by an orthonormal basis as G phi - P (R phi)."""
        kept = _squares(split.low)
        scales = _squares(split.inner).sqrt() / (kept.sqrt() + _SMALL)
        if split.projector.orthonormal:
            rest, squares = split.gradient, _squares(split.gradient) - kept
        else:
            rest = split.rest()
            squares = _squares(rest)
        size = split.total(squares.clamp_min(0) @ scales.square()).sqrt()
        scales = scales * (self._limited(size, split.state) * split.factor)
        target.addcmul_(rest, scales, value=-rate)
        return -(split.low * scales) if split.projector.orthonormal else None

    def _limited(self, size: Tensor, state: State) -> Tensor:
        """Return what S of this norm is multiplied by, and remember the norm that is left."""
        last = state.get("rest_norm", torch.full_like(size, torch.inf))
        share = (self.growth * last / (size + _SMALL)).clamp_max(1.0)
        # A gradient of zeros has no norm to grow from: from nothing, a rest would need thousands of steps.
        state["rest_norm"] = torch.where(size > 0, (share * size).clamp_min(_SMALL), last)
        return share


def _squares(matrix: Tensor) -> Tensor:
    """Return squared norms of columns, by the way that is faster where they lie in memory."""
    if matrix.stride(0) == 1:
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=0)
        return norms.square()
    return matrix.square().sum(0)


@dataclass(frozen=True)
class Sign(Residual):
    """The sign of the rest (FRUGAL).

    Args:
        weight: lambda.
    """

    weight: float = 1.0

    def add(self, target: Tensor, split: Split, rate: float) -> Tensor | None:
        """Subtract lambda sign(E); what rounding leaves of nothing has no sign."""
        if isinstance(split.projector, Coordinates):  # G has the rest's signs, and R what is too much
            for part, entries in zip(_pieces(target), _pieces(split.gradient), strict=True):
                part.sub_(entries.sign(), alpha=rate * self.weight)
            return -self.weight * split.low.sign()
        rest = split.rest()
        noise = 4 * torch.finfo(rest.dtype).eps * split.low.abs().amax(0)
        target.sub_(rest.sign().mul_(rest.abs_() > noise), alpha=rate * self.weight)
        return None


def _pieces(matrix: Tensor) -> tuple[Tensor, ...]:
    """Return rows as they lie in memory, on a CPU so few at a time that they stay in its cache."""
    stored, _ = as_stored(matrix)
    size = _CACHED // max(1, stored.shape[1]) if matrix.device.type == "cpu" else len(stored)
    pieces: tuple[Tensor, ...] = stored.split(max(1, size))
    return pieces


@dataclass(frozen=True)
class Plain(Residual):
    """The rest itself.

    Args:
        weight: what it is multiplied by.
    """

    weight: float = 1.0

    def add(self, target: Tensor, split: Split, rate: float) -> Tensor | None:
        """Subtract lambda E, as G less what comes back from R."""
        target.sub_(split.gradient, alpha=rate * self.weight)
        return -self.weight * split.low


@dataclass(frozen=True)
class Sparse(Residual):
    """Adam on the largest entries of the rest, chosen after every refresh and fixed until the next (GaLore+).

    Their indices (int32) and moments are kept; the moments start at zero with every choice.

    Args:
        density: share of the entries.
        inner: what moves them.
        warmup: steps after a refresh whose |E| add up, in the weight's size, to what is chosen from; nothing
            is moved before the last of them.
    """

    density: float = 1e-2
    inner: Adam = field(default_factory=Adam)
    warmup: int = 1
    columnwise = False

    def add(self, target: Tensor, split: Split, rate: float) -> Tensor | None:
        """Subtract Adam's direction on the support alone."""
        state, rest = split.state, split.rest()
        if "support" not in state and not self._choose(rest, state):
            return None
        support = state["support"].long()
        state["rest.step"] += 1
        moments = {name: state[f"rest.{name}"] for name in _MOMENTS if f"rest.{name}" in state}
        moved, own = self.inner.direction(rest.flatten()[support], moments, int(state["rest.step"]))
        state.update({f"rest.{name}": value for name, value in moments.items()})
        changed = torch.zeros_like(rest).flatten().index_copy_(0, support, own * moved)
        target.sub_(changed.view(rest.shape), alpha=rate)
        return None

    def _choose(self, rest: Tensor, state: State) -> bool:
        """Choose the support if the warm-up ends here, and say whether it does."""
        if "rest.total" not in state:
            for name in ("step", *_MOMENTS):
                state.pop(f"rest.{name}", None)
            state["rest.total"] = torch.zeros_like(rest)
            state["rest.seen"] = torch.zeros((), dtype=torch.int64)
        state["rest.total"] += rest.abs()
        state["rest.seen"] += 1
        if int(state["rest.seen"]) < self.warmup:
            return False
        count = max(1, round(self.density * rest.numel()))
        largest = state.pop("rest.total").flatten().topk(count).indices
        state["support"] = largest.sort().values.to(torch.int32)
        state["rest.step"] = torch.zeros_like(state.pop("rest.seen"))
        return True


RESIDUALS: dict[str, Residual] = {
    "drop": Residual(),
    "scaled": Scaled(),
    "sign": Sign(),
    "sgd": Plain(),
    "sparse": Sparse(),
}
