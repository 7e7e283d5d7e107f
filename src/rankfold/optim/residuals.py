"""What a projected optimizer does with the part of a gradient that its basis leaves out, E = G - P P^T G."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .inner import Adam, State

_SMALL = 1e-8


class Residual:
    """Leaves the rest out (GaLore)."""

    drops = True

    def direction(
        self, rest: Tensor, low: Tensor, inner: Tensor, factor: float, state: State, step: int
    ) -> Tensor | None:
        """Return what is to be subtracted beside `up(inner)`, (d, n).

        Args:
            rest: E (d, n).
            low: R = P^T G (r, n).
            inner: the inner optimizer's direction N (r, n).
            factor: that belongs to N.
            state: of the weight.
            step: number of steps since the inner optimizer began, from 1.
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
    drops = False

    def direction(
        self, rest: Tensor, low: Tensor, inner: Tensor, factor: float, state: State, step: int
    ) -> Tensor | None:
        """Return S, with the inner optimizer's factor."""
        scaled = rest * self.scales(low, inner)
        limited: Tensor = scaled * (factor * self.limited(scaled.norm(), state))
        return limited

    @staticmethod
    def scales(low: Tensor, inner: Tensor) -> Tensor:
        """Return phi, (n,)."""
        scales: Tensor = inner.norm(dim=0) / (low.norm(dim=0) + _SMALL)
        return scales

    def limited(self, size: Tensor, state: State) -> Tensor:
        """Return what S of this norm is multiplied by, and remember the norm that is left."""
        last, share = state.get("rest_norm"), torch.ones_like(size)
        if last is not None:
            share = (self.growth * last / (size + _SMALL)).clamp_max(1.0)
        state["rest_norm"] = (share * size).clamp_min(_SMALL)
        return share


@dataclass(frozen=True)
class Sign(Residual):
    """The sign of the rest (FRUGAL).

    Args:
        weight: lambda.
    """

    weight: float = 1.0
    drops = False

    def direction(
        self, rest: Tensor, low: Tensor, inner: Tensor, factor: float, state: State, step: int
    ) -> Tensor | None:
        """Return lambda sign(E); what rounding leaves of nothing has no sign."""
        noise = 4 * torch.finfo(rest.dtype).eps * low.abs().max()
        return self.weight * torch.where(rest.abs() > noise, rest.sign(), 0)


@dataclass(frozen=True)
class Plain(Residual):
    """The rest itself.

    Args:
        weight: what it is multiplied by.
    """

    weight: float = 1.0
    drops = False

    def direction(
        self, rest: Tensor, low: Tensor, inner: Tensor, factor: float, state: State, step: int
    ) -> Tensor | None:
        """Return lambda E."""
        return self.weight * rest


@dataclass(frozen=True)
class Sparse(Residual):
    """Adam on the largest entries of the rest, chosen at every refresh (GaLore+).

    Args:
        density: share of the entries.
        inner: what moves them.
    """

    density: float = 1e-2
    inner: Adam = field(default_factory=Adam)
    drops = False

    def direction(
        self, rest: Tensor, low: Tensor, inner: Tensor, factor: float, state: State, step: int
    ) -> Tensor | None:
        """Return the direction on the support, zero elsewhere."""
        if "support" not in state:
            count = max(1, round(self.density * rest.numel()))
            state["support"] = rest.abs().flatten().topk(count).indices.sort().values.to(torch.int32)
        support = state["support"].long()
        moments = {
            name: state[f"rest.{name}"] for name in ("exp_avg", "exp_avg_sq") if f"rest.{name}" in state
        }
        moved, own = self.inner.direction(rest.flatten()[support], moments, step)
        state.update({f"rest.{name}": value for name, value in moments.items()})
        return torch.zeros_like(rest).view(-1).index_copy_(0, support, own * moved).view_as(rest)


RESIDUALS: dict[str, Residual] = {
    "drop": Residual(),
    "scaled": Scaled(),
    "sign": Sign(),
    "sgd": Plain(),
    "sparse": Sparse(),
}
