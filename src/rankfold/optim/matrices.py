"""A weight as the matrix that is projected, and where its numbers are: here, or in shards over processes.

The projected side comes first: a gradient is G (d, n), a basis P (d, r). Columns of G do not meet in
`P^T G`, in moments or in `P N`. So where a weight is sharded (a DTensor, as FSDP2 makes it), every process
takes some of the columns, whole: moments are shards of (r, n), and what is communicated is G's change of
side, where rows were sharded, and the whole G when a basis is chosen. Parts that look across columns
(Adafactor's means, moments in blocks, online PCA, a sparse rest) get the whole G instead, one weight at a
time, and keep the whole state in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .rounding import HALF, stochastically_rounded
from .seeds import hashed

State = dict[str, Any]
BASIS = "basis."  # before the names of what a basis is made of


@dataclass
class Work:
    """One parameter in one step."""

    group: dict[str, Any]
    name: str
    parameter: Tensor
    gradient: Tensor
    seed: int = 0


def named(index: int, group: dict[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a group's parameters with their names, or their places where they have none."""
    names = group.get("param_names", [f"{index}.{i}" for i in range(len(group["params"]))])
    yield from zip(names, group["params"], strict=True)


def is_projected(group: dict[str, Any], parameter: Tensor) -> bool:
    """Tell whether a parameter's gradient is projected."""
    return group["rank"] is not None and parameter.dim() > 1


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """Return (out, in * window); a vector is one column."""
    rows = len(parameter) if parameter.dim() else 1
    return rows, parameter.numel() // max(1, rows)


def is_left(group: dict[str, Any], shape: tuple[int, int]) -> bool:
    """Tell whether rows are projected, and not columns."""
    rows, columns = shape
    if group["side"] in ("left", "right"):
        return bool(group["side"] == "left")
    return bool((rows < columns) == (group["side"] == "auto"))


def floating(gradient: Tensor) -> Tensor:
    """Return float64 as it is, and everything else as float32."""
    return gradient if gradient.dtype == torch.float64 else gradient.float()


def basis_of(state: State) -> dict[str, Tensor]:
    """Return what the basis in a state is made of."""
    return {key.removeprefix(BASIS): value for key, value in state.items() if key.startswith(BASIS)}


def keep_basis(state: State, basis: dict[str, Tensor]) -> None:
    """Put a basis into a state."""
    state.update({f"{BASIS}{key}": value for key, value in basis.items()})


class Layout:
    """A weight that is whole in this process.

    Attributes:
        left: rows are projected, and not columns.
        low: shape of the projected gradient (r, n), or of the parameter where nothing is projected.
        is_sharded: it is a DTensor.
        spread: this process computes with some of the columns.
    """

    is_sharded = False
    spread = False

    def __init__(self, group: dict[str, Any], parameter: Tensor) -> None:
        rows, columns = matrix_shape(parameter)
        self.parameter, self.projected = parameter, is_projected(group, parameter)
        self.left = is_left(group, (rows, columns))
        self.low = tuple(parameter.shape)
        if self.projected:
            self.low = (group["rank"], columns if self.left else rows)

    def turned(self, matrix: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape with the projected side first."""
        if not self.projected:
            return matrix
        matrix = matrix.reshape(len(matrix), -1)
        return matrix if self.left else matrix.T

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return this process's columns of G."""
        return self.turned(floating(gradient))

    def whole(self, gradient: Tensor) -> Tensor:
        """Return all of G."""
        return self.gradient(gradient)

    def local(self, gradient: Tensor) -> Tensor:
        """Return the entries of the gradient that are in this process."""
        return gradient

    def opened(self, state: State) -> State:
        """Return the state as this process computes with it."""
        return state

    def close(self, state: State, opened: State) -> None:
        """Put back what has changed."""

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over processes that hold other columns."""
        return value

    def begin(self, group: dict[str, Any], state: State) -> tuple[Tensor, Tensor]:
        """Return the decayed weight at full precision, and as (d, n) what a change is added to."""
        base = self._full(group, state, self.parameter)
        return base, self.turned(base)

    def end(self, work: Work, state: State, base: Tensor, target: Tensor) -> None:
        """Round the weight to what it is stored in, if it is not what has been changed."""
        self._store(work, state, base, self.parameter)

    def _full(self, group: dict[str, Any], state: State, value: Tensor) -> Tensor:
        base = value
        if value.dtype in HALF:
            base = state["master"] if "master" in state else value.float()
        if not base.is_contiguous():
            base = base.contiguous()
        if group["weight_decay"]:
            base.mul_(1 - group["lr"] * group["weight_decay"])
        return base

    def _store(self, work: Work, state: State, base: Tensor, value: Tensor) -> None:
        if base is value:
            return
        if value.dtype in HALF and work.group["rounding"] == "stochastic":
            seed = hashed("rounding", work.seed, work.name, int(state["step"]), *self._place())
            base = stochastically_rounded(base, value.dtype, torch.Generator().manual_seed(seed))
        value.copy_(base)

    def _place(self) -> tuple[int, ...]:
        """Return what tells this process's part of a weight from others'."""
        return ()


def layout_of(group: dict[str, Any], parameter: Tensor, columnwise: bool) -> Layout:
    """Return where a parameter's numbers are.

    Args:
        group: its group.
        parameter: a tensor or DTensor.
        columnwise: nothing that the optimizer does looks across columns of G, beside the choice of a basis.
    """
    if not hasattr(parameter, "device_mesh"):
        return Layout(group, parameter)
    from .sharded import ShardedLayout

    return ShardedLayout(group, parameter, columnwise)
