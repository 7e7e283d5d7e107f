"""What a projected optimizer refuses, before anything is changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import InvalidOption, InvalidRank, near_names
from .bases import TRANSPORTS
from .inner import Inner
from .matrices import State, Work, is_projected, matrix_shape
from .rounding import ROUNDINGS, require_roundable

SIDES = ("auto", "reverse", "left", "right")
# What a state is only right with; rates, which schedules change, are not among them.
_FIXED = ("rank", "side", "refresh", "transport", "overlap", "rounding", "scale", "parts", "heads", "turns")


def chosen(what: str, known: dict[str, Any], wanted: Any) -> Any:
    """Return what a name stands for, or the object itself."""
    if not isinstance(wanted, str):
        return wanted
    if wanted not in known:
        listed = near_names(wanted, known) or f"; known: {', '.join(known)}"
        raise InvalidOption(f"there is no {what} {wanted!r}{listed}")
    return known[wanted]


def require_options(group: dict[str, Any]) -> None:
    """Refuse options of a group that are impossible."""
    for key, choices in (("side", SIDES), ("transport", TRANSPORTS), ("rounding", ROUNDINGS)):
        if group[key] not in choices:
            raise InvalidOption(f"{key} must be one of {', '.join(choices)}, not {group[key]!r}")
    for key, least in (("lr", 0.0), ("weight_decay", 0.0), ("refresh", 1), ("rank", 1)):
        value = group[key]
        if value is not None and not least <= value < math.inf:
            raise InvalidOption(f"{key} must be a finite number of at least {least:g}, not {value!r}")
        if value is not None and least == 1 and value != int(value):
            raise InvalidOption(f"{key} must be a whole number, not {value!r}")
    if group["overlap"] is not None and not 0 < group["overlap"] <= 1:
        raise InvalidOption(f"overlap must be in (0, 1], not {group['overlap']!r}")


def require_weight(group: dict[str, Any], name: str, parameter: Parameter) -> None:
    """Refuse a weight that cannot hold the rank, is complex, or is not rounded as it is meant to be."""
    if parameter.is_complex():
        raise InvalidOption(f"{name} is complex, and only real weights are projected and rounded")
    if group["rounding"] == "stochastic" and parameter.dtype == torch.float16:
        require_roundable(parameter.dtype)
    if not is_projected(group, parameter):
        return
    most = min(matrix_shape(parameter))
    if group["rank"] > most:
        raise InvalidRank(f"{name}: rank {group['rank']} is more than its smaller side, {most}")


def require_fitting(work: Work, inner: Inner, low: Sequence[int], state: State) -> None:
    """Refuse a gradient that is sparse, and a weight whose state was made for another shape, rank or side."""
    _require_dense(work)
    if "shape" in state:
        require_shape(work, state["shape"].tolist())
    for name in inner.first + inner.second:
        if name in state and tuple(state[name].shape) != tuple(low):
            raise InvalidOption(
                f"{work.name} has moments of shape {tuple(state[name].shape)} where {tuple(low)} is needed: "
                "the rank or the side has changed; give it to a new optimizer"
            )


def require_shape(work: Work, made: Sequence[int]) -> None:
    """Refuse a weight that has another shape than the one its state was made for."""
    shape = tuple(work.parameter.shape)
    if tuple(made) != shape:
        raise InvalidOption(
            f"{work.name} has the shape {shape}, and its state was made for {tuple(made)}: "
            "give it to a new optimizer"
        )


def require_gradients(work: Sequence[Work]) -> None:
    """Refuse gradients that are sparse or not finite."""
    for each in work:
        _require_dense(each)
    require_finite(work, [each.gradient for each in work])


def _require_dense(work: Work) -> None:
    if work.gradient.is_sparse:
        raise InvalidOption(f"{work.name} has a sparse gradient, which cannot be projected")


def require_finite(work: Sequence[Work], seen: Sequence[Tensor]) -> None:
    """Refuse gradients that are not finite, in all processes alike.

    Args:
        work: parameters.
        seen: of every gradient, something that is not finite if the gradient is not; this process's part.
    """
    if not work:
        return
    norms = torch._foreach_norm(list(seen))
    wrong = torch.stack([norm.to(norms[0]) for norm in norms]).isfinite().logical_not().float()
    for at in wrong.nonzero().flatten().tolist():  # the norm of finite entries may be too large for its dtype
        wrong[at] = float(not seen[at].isfinite().all())
    meshes = {each.parameter.device_mesh for each in work if hasattr(each.parameter, "device_mesh")}
    for mesh in sorted(meshes, key=str):
        for axis in range(mesh.ndim):
            torch.distributed.all_reduce(wrong, group=mesh.get_group(axis))
    if bool(wrong.any()):
        name = work[int(wrong.nonzero()[0])].name
        raise InvalidOption(
            f"the gradient of {name} is not finite; no step was taken and nothing has changed"
        )


def require_same(saved: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> None:
    """Refuse a state that was saved by an optimizer with other parts or other fixed options."""
    for number, (theirs, ours) in enumerate(zip(saved, own, strict=False)):
        for key in _FIXED:
            saved_one, own_one = theirs.get(key), ours.get(key)
            if saved_one != own_one:
                raise InvalidOption(
                    f"group {number} of the state was saved with {key} {saved_one!r}, and this optimizer "
                    f"has {own_one!r}: make it as it was, or begin without the state"
                )


def spelled(part: Any) -> str:
    """Return a part of an optimizer as text that is alike in every run.

    Example:
        >>> from rankfold.optim import Scaled
        >>> spelled(Scaled()), spelled(None)
        ('Scaled(growth=1.01)', 'None')
    """
    kind = type(part)
    if dataclasses.is_dataclass(part):
        inside = [f"{f.name}={spelled(getattr(part, f.name))}" for f in dataclasses.fields(part)]
        return f"{kind.__name__}({', '.join(inside)})"
    return repr(part) if kind.__module__ == "builtins" else kind.__name__
