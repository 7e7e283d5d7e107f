"""An optimizer's state for one parameter: reading it, and letting it follow a change of the parameter.

Any optimizer of PyTorch's shape is served: whatever it keeps per parameter in the parameter's own shape is
taken to be a moment of its gradient. Names tell first moments from second ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_log = logging.getLogger("rankfold")
_FIRST = ("exp_avg", "momentum_buffer")
_FACTORED = {"row_var": -1, "col_var": -2, "exp_avg_sq_row": -1, "exp_avg_sq_col": -2}  # the axis summed over
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "sum", "square_avg")


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the PyTorch optimizer inside a wrapper such as Accelerate's."""
    while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    while type(optimizer).__name__ == "AcceleratedOptimizer":  # is an Optimizer itself, and steps another one
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return what the optimizer keeps in the shape of a parameter, by name; empty before its first step."""
    state = optimizer.state.get(parameter, {})
    shape = parameter.shape
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {k: v for k, v in tensors.items() if v.dim() and v.shape == shape}


def first_moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the moments that are linear in the gradient."""
    return {k: v for k, v in moments(optimizer, parameter).items() if k in _FIRST}


def second_moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the moments that are quadratic in the gradient."""
    return {k: v for k, v in moments(optimizer, parameter).items() if k in _SECOND}


def keep_precision(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Put a state that was just loaded back into its own precision; PyTorch gives it that of the weights.

    Counters and shapes stay on the CPU; the rest goes beside the weights.
    """
    order = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, order, strict=True):
        stored = state_dict["state"].get(number)
        if stored is not None:
            optimizer.state[parameter] = {
                key: value.detach().clone().to(_place(key, value, parameter)) for key, value in stored.items()
            }


def _place(key: str, value: Tensor, parameter: Tensor) -> torch.device:
    is_read = key == "shape" or (value.dim() == 0 and not value.is_floating_point())
    return value.device if is_read else parameter.device


@torch.no_grad()
def reset(
    optimizer: Optimizer, parameter: Tensor, index: Tensor | None = None, axis: int = 0, *, steps: bool = True
) -> None:
    """Set a parameter's moments to zero; quantised ones, whose codes are not zero there, are begun anew.

    Args:
        optimizer: holds the parameter.
        parameter: whose moments.
        index: positions along `axis`; None resets all of them.
        axis: of `index`.
        steps: also start the step count again where all moments are reset; optimizers count the steps of a
            whole parameter, so the bias correction of a part goes on.
    """
    state = optimizer.state.get(parameter, {})
    if any(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in state.values()):
        state.clear()
        return
    for value in moments(optimizer, parameter).values():
        if index is None:
            value.zero_()
        else:
            value.index_fill_(axis, index.to(value.device), 0)
    if steps and index is None and "step" in state:
        state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0


@torch.no_grad()
def resize(optimizer: Optimizer, parameter: Tensor, axis: int, keep: Tensor, added: int = 0) -> None:
    """Let the moments follow a parameter of which entries along an axis were kept and fresh ones added.

    Call it before the parameter itself is changed. Kept entries keep their moments, fresh ones start at zero.
    Adafactor's moments of rows and of columns follow where they have the axis. An optimizer that keeps
    something else of the parameter, such as quantised moments, starts anew with it and says so in the log.

    Args:
        optimizer: holds the parameter.
        parameter: as it was before.
        axis: that is resized.
        keep: positions along the axis that stay, in their new order.
        added: number of fresh entries after them.
    """
    state = optimizer.state.get(parameter, {})
    held = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim()}
    strange = [name for name, value in held.items() if not _follows(name, value, parameter.shape)]
    if strange:
        _log.warning(
            "%s keeps %s in a form that cannot follow a change of rank, and starts anew with that parameter",
            type(optimizer).__name__,
            ", ".join(strange),
        )
        state.clear()
        return
    for name, value in held.items():
        own = _own_axis(name, value, parameter.dim(), axis)
        if own is not None:
            state[name] = kept_and_fresh(value, own, keep, added)


def kept_and_fresh(value: Tensor, axis: int, keep: Tensor, added: int) -> Tensor:
    """Return the kept entries along an axis, followed by zeros for the fresh ones.

    Example:
        >>> kept_and_fresh(torch.tensor([1.0, 2.0, 3.0]), 0, torch.tensor([2, 0]), 1)
        tensor([3., 1., 0.])
    """
    kept = value.index_select(axis, keep.to(value.device))
    shape = list(kept.shape)
    shape[axis] = added
    return torch.cat([kept, kept.new_zeros(shape)], axis)


def _follows(name: str, value: Tensor, shape: torch.Size) -> bool:
    reduced = _FACTORED.get(name)
    if reduced is None:
        return value.shape == shape and value.is_floating_point()
    kept = [1 if axis == len(shape) + reduced else size for axis, size in enumerate(shape)]
    return value.numel() == math.prod(kept)


def _own_axis(name: str, value: Tensor, dimensions: int, axis: int) -> int | None:
    """Return which axis of a moment is the given one of the parameter, or None where it was summed over."""
    if name not in _FACTORED:
        return axis
    reduced = dimensions + _FACTORED[name]
    if axis == reduced:
        return None
    return axis - 1 if axis > reduced and value.dim() < dimensions else axis


@torch.no_grad()
def transform(
    optimizer: Optimizer,
    parameter: Tensor,
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Replace a parameter's first moments by a linear map of them, its second moments by another one.

    Args:
        optimizer: holds the parameter.
        parameter: as it was before.
        first: of the gradient's own coordinates.
        second: of their squares; None sets the second moments to zero in the mapped shape.
    """
    state = optimizer.state.get(parameter, {})
    firsts = first_moments(optimizer, parameter)
    for name, value in moments(optimizer, parameter).items():
        if name in firsts:
            state[name] = first(value).contiguous()
        else:
            state[name] = torch.zeros_like(first(value)) if second is None else second(value).contiguous()


def adam_options(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """Return learning rate, betas, eps and weight decay of a parameter under Adam or AdamW, else None.

    `decoupled` says whether the decay acts on the parameter itself and not through its gradient.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return None
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
    chosen = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "maximize")}
    return {**chosen, "decoupled": decoupled}
