"""What methods share that exchange parameters while training runs: the optimizer follows the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..weights import Staged
from .run import Run

Kind = TypeVar("Kind", bound=Staged)


def staged(run: Run, kind: type[Kind]) -> dict[str, Kind]:
    """Return the part of that kind in every expression that has one, by path."""
    found = {
        path: next((part for part in expression.modules() if isinstance(part, kind)), None)
        for path, expression in run.expressions.items()
    }
    return {path: part for path, part in found.items() if part is not None}


def parameters_of(part: nn.Module) -> list[nn.Parameter]:
    """Return what trains in a part of an expression."""
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def take_place(run: Run, before: Sequence[Tensor], after: Sequence[nn.Parameter]) -> None:
    """Let fresh parameters, without any state, stand where the first of others stood; those leave.

    Args:
        run: the training; its model holds the fresh ones already.
        before: parameters that the model no longer has.
        after: those that it has instead.
    """
    known = {id(parameter): name for name, parameter in run.model.named_parameters()}
    group = run.group(before[0])
    place = next(i for i, held in enumerate(group["params"]) if held is before[0])
    group["params"][place:place] = after
    if "param_names" in group:
        group["param_names"][place:place] = [known[id(parameter)] for parameter in after]
    for parameter in before:
        leave(run.optimizer, parameter)


def leave(optimizer: Optimizer, parameter: Tensor) -> None:
    """Take a parameter and its state out of an optimizer."""
    parameter.grad = None
    optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        _drop(group, parameter)


def _drop(group: dict[str, Any], parameter: Tensor) -> None:
    kept = [i for i, held in enumerate(group["params"]) if held is not parameter]
    if "param_names" in group:
        group["param_names"] = [group["param_names"][i] for i in kept]
    group["params"] = [group["params"][i] for i in kept]
