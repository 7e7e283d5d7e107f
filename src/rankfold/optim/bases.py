"""When a basis is chosen anew, and what becomes of the moments then."""

from __future__ import annotations

import torch
from torch import Tensor

from .inner import Inner
from .matrices import State, Work, basis_of, keep_basis
from .projectors import Projector
from .seeds import hashed

TRANSPORTS = ("keep", "rotate", "reset")
_MOST = 16  # times the interval may grow


def is_due(state: State) -> bool:
    """Tell whether the next step needs another basis."""
    return "due" not in state or int(state["step"]) >= int(state["due"])


def refresh(
    projector: Projector,
    inner: Inner,
    work: Work,
    gradient: Tensor,
    state: State,
    staggered: bool,
) -> None:
    """Choose the basis anew, and let moments follow as they are meant to.

    Args:
        projector: how it is chosen.
        inner: whose moments they are.
        work: the parameter.
        gradient: G (d, n), or what is to be seen of it.
        state: opened; changed in place.
        staggered: the first interval is shorter, by the name.
    """
    group, old = work.group, basis_of(state)
    new = projector.fit(gradient, group["rank"], old, generator_of(work, state))
    turn = None
    if old and (group["transport"] == "rotate" or group["overlap"] is not None):
        turn = projector.shared(new, old, gradient)
    if old:
        _transport(group["transport"], inner, state, turn)
    keep_basis(state, new)
    state.pop("support", None)
    _schedule(work, state, turn, staggered)
    if not old and not bool(gradient.any()):  # as behind a head of zeros: it tells no directions
        state["due"].zero_()


def generator_of(work: Work, state: State) -> torch.Generator:
    """Return what is drawn from in this step, alike in every process."""
    return torch.Generator().manual_seed(hashed(work.seed, work.name, int(state["step"])))


def _schedule(work: Work, state: State, turn: Tensor | None, staggered: bool) -> None:
    """Set the step of the next choice."""
    group = work.group
    gap = int(state.get("gap", group["refresh"]))
    if turn is not None and group["overlap"] is not None:
        same = float(turn.square().sum()) / group["rank"] >= group["overlap"]
        gap = min(2 * gap, _MOST * group["refresh"]) if same else group["refresh"]
    if group["overlap"] is not None:
        state["gap"] = torch.tensor(gap)
    first = not int(state.get("due", 0)) and staggered
    shift = hashed(work.name) % group["refresh"] if first else 0
    state["due"] = torch.tensor(int(state["step"]) + (shift or gap))


def _transport(transport: str, inner: Inner, state: State, turn: Tensor | None) -> None:
    if transport == "reset":
        state["inner_step"].zero_()
        inner.forget(state)
    elif transport == "rotate" and turn is not None:
        inner.turn(state, turn)
