"""An optimizer's state for the two factors of a product that is squeezed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InvalidOption
from ..optim import moments, reset, transform, unwrapped
from ..weights import Dense, Leaf, Pair, Weight
from .run import MEMORY
from .squeezing import Cut

_log = logging.getLogger("rankfold")


def check_holds(optimizer: Any, pairs: Mapping[str, tuple[Weight, Pair]]) -> None:
    """Refuse what is no optimizer, or one that steps other parameters.

    Raises:
        InvalidOption: naming what it lacks.
    """
    inner = unwrapped(optimizer)
    if not isinstance(inner, Optimizer):
        raise InvalidOption(f"optimizer must be one of PyTorch, not {type(optimizer).__name__}")
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    for path, (_, pair) in pairs.items():
        for leaf in (pair.up, pair.down):
            if id(_parameter(leaf)) not in held:
                raise InvalidOption(f"the optimizer does not hold {leaf.name} of {path}, which is squeezed")


def follow(optimizer: Optimizer, pair: Pair, cut: Cut) -> None:
    """Map the moments of both factors as their gradients are mapped; call it before they are resized.

        dB' = dB N^T,   dA' = M^T diag(1/g) dA

    A gate g that is multiplied into A divides the gradient of A. Where it is zero M is, too.
    """
    to_up, to_down = cut.down_map.mT, cut.up_map.mT
    if pair.gate is not None:
        gate = pair.gate.tensor().detach().to(to_down)
        to_down = torch.where(gate == 0, 0, to_down / gate)
        _dismiss(optimizer, pair.gate)
    _map(optimizer, _parameter(pair.up), lambda m: m @ to_up, lambda v: v @ to_up.square(), to_up)
    _map(optimizer, _parameter(pair.down), lambda m: to_down @ m, lambda v: to_down.square() @ v, to_up)


def start_again(optimizer: Optimizer, pair: Pair, rank: int) -> None:
    """Let both factors begin at a rank with no moments and no steps; call it before they are resized."""
    up, down = _parameter(pair.up), _parameter(pair.down)
    if pair.gate is not None:
        _dismiss(optimizer, pair.gate)
    for parameter, shape in ((up, (up.shape[0], rank)), (down, (rank, down.shape[1]))):
        reset(optimizer, parameter)
        _map(optimizer, parameter, _zeros(shape), None, parameter)


def forget(optimizer: Optimizer) -> None:
    """Drop what dynamics and rank rules remember, which is of the old factors."""
    for group in optimizer.param_groups:
        group.pop(MEMORY, None)


def _zeros(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda moment: moment.new_zeros(shape)


def _map(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor] | None,
    like: Tensor,
) -> None:
    """Map moments in the precision of the maps; what is kept in another form begins anew."""
    state, known = optimizer.state.get(parameter, {}), moments(optimizer, parameter)
    held = [key for key, value in state.items() if isinstance(value, Tensor) and value.dim()]
    strange = [key for key in held if type(known.get(key)) is not Tensor]
    if strange:
        _log.warning(
            "%s keeps %s in a form that cannot follow a squeeze, and starts anew with that parameter",
            type(optimizer).__name__,
            ", ".join(strange),
        )
        state.clear()
        return
    squares = None if second is None else _in(like, second)
    transform(optimizer, parameter, _in(like, first), squares)


def _in(like: Tensor, map: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a map that computes in the dtype of a tensor, and gives the moment's own."""
    return lambda moment: map(moment.to(like.dtype)).to(moment.dtype)


def _dismiss(optimizer: Optimizer, gate: Leaf) -> None:
    """Take a gate that is multiplied in out of the optimizer."""
    parameter = gate.tensor()
    optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if each is not parameter]


def _parameter(leaf: Leaf) -> nn.Parameter:
    assert isinstance(leaf, Dense)
    assert isinstance(leaf.value, nn.Parameter)
    return leaf.value
