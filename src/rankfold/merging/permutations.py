"""Permutations of hidden units: which axes of which tensors they move, and how.

A network computes the same when its hidden units change places, as long as every tensor that reads or writes
them follows:

    W_l' = P_l W_l P_{l-1}^T,  b_l' = P_l b_l

A specification gives, for each tensor and axis, the name of the permutation that acts on it. Units may be
blocks of neighbours, such as attention heads or the pixels of a channel, and may occur in several groups,
such as the queries, keys and values of one matrix. `merge.symmetries` derives it for known architectures.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption, near_names
from ..optim.seeds import hashed
from ..statistics.batches import call
from ..statistics.calibrating import calibrating

Orders: TypeAlias = Mapping[str, Tensor]

_ROUNDING = 100 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Axis:
    """How a permutation acts on one axis of a tensor: viewed as (groups, units, block), it moves the middle.

    Attributes:
        permutation: its name.
        units: how many places it has.
        groups: how many times the units occur along the axis.
    """

    permutation: str
    units: int
    groups: int = 1

    def moved(self, tensor: Tensor, dim: int, order: Tensor) -> Tensor:
        """Return the tensor with unit `order[i]` of an axis at place i."""
        split = self._split(tensor, dim)
        return split.index_select(dim + 1, order.to(tensor.device)).flatten(dim, dim + 2)

    def unfolded(self, tensor: Tensor, dim: int) -> Tensor:
        """Return a row for every unit, with all that belongs to it: (units, the rest)."""
        dim %= tensor.dim()
        return self._split(tensor, dim).movedim(dim + 1, 0).flatten(1)

    def _split(self, tensor: Tensor, dim: int) -> Tensor:
        split: Tensor = tensor.unflatten(dim, (self.groups, self.units, -1))
        return split


@dataclass(frozen=True)
class Specification:
    """Which permutation acts on which axis of which tensor.

    Attributes:
        tensors: for each tensor that moves, the axis's permutation or None, axis by axis.

    Example:
        >>> import torch
        >>> hidden = Axis("hidden", units=3)
        >>> spec = Specification({"up": (hidden, None), "down": (None, hidden)})
        >>> order = {"hidden": torch.tensor([2, 0, 1])}
        >>> spec.permuted("up", torch.tensor([[1], [2], [3]]), order).flatten().tolist()
        [3, 1, 2]
    """

    tensors: Mapping[str, tuple[Axis | None, ...]]
    units: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        units: dict[str, int] = {}
        for name, axis in ((name, axis) for name, axes in self.tensors.items() for axis in axes if axis):
            if units.setdefault(axis.permutation, axis.units) != axis.units:
                raise InvalidOption(
                    f"{name}: the permutation {axis.permutation!r} has {axis.units} units here and "
                    f"{units[axis.permutation]} elsewhere"
                )
        object.__setattr__(self, "units", units)

    def places(self, name: str) -> Iterator[tuple[int, Axis]]:
        """Yield the axes of a tensor that a permutation acts on."""
        yield from ((dim, axis) for dim, axis in enumerate(self.tensors.get(name, ())) if axis)

    def permuted(self, name: str, tensor: Tensor, orders: Orders, *, but: int | None = None) -> Tensor:
        """Return a tensor with its units in another order.

        Args:
            name: of the tensor; one that no permutation acts on is returned as it is.
            tensor: its values.
            orders: for each permutation, which unit comes to each place (units,).
            but: an axis that is left alone.
        """
        for dim, axis in self.places(name):
            if dim != but:
                tensor = axis.moved(tensor, dim, orders[axis.permutation])
        return tensor

    def identity(self) -> dict[str, Tensor]:
        """Return the orders that leave every unit where it is."""
        return {name: torch.arange(units) for name, units in self.units.items()}

    def drawn(self, seed: int = 0) -> dict[str, Tensor]:
        """Return random orders."""
        return {
            name: torch.randperm(units, generator=torch.Generator().manual_seed(hashed(seed, name)))
            for name, units in self.units.items()
        }

    def only(self, names: Iterable[str]) -> Specification:
        """Return the specification of some of the tensors."""
        kept = set(names)
        return Specification({name: axes for name, axes in self.tensors.items() if name in kept})


def specified(
    given: Mapping[str, Sequence[Any]] | Specification, shapes: Mapping[str, Sequence[int]]
) -> Specification:
    """Return a specification that was written by hand, checked against the tensors.

    Args:
        given: for each tensor, axis by axis, None, an `Axis`, or the permutation's name, which then moves
            every entry by itself; (name, units) or (name, units, groups) moves blocks.
        shapes: of the tensors, by name.

    Raises:
        InvalidOption: a tensor is not there, has another number of axes, or an axis does not divide into
            the units.

    Example:
        >>> shapes = {"up": (6, 4), "down": (4, 6)}
        >>> spec = specified({"up": ["hidden", None], "down": [None, "hidden"]}, shapes)
        >>> dict(spec.units)
        {'hidden': 6}
        >>> specified({"up": [("heads", 4), None]}, shapes)
        Traceback (most recent call last):
        ...
        rankfold.errors.InvalidOption: up: axis 0 has 6 entries, which are not 4 units in 1 groups
    """
    tensors = given.tensors if isinstance(given, Specification) else given
    return Specification({name: _checked(name, axes, shapes) for name, axes in tensors.items()})


def _checked(name: str, axes: Any, shapes: Mapping[str, Sequence[int]]) -> tuple[Axis | None, ...]:
    if name not in shapes:
        raise InvalidOption(f"spec: the model has no tensor {name!r}{near_names(name, shapes)}")
    shape = shapes[name]
    if isinstance(axes, str) or not isinstance(axes, Sequence) or len(axes) != len(shape):
        raise InvalidOption(
            f"spec: {name} has the shape {tuple(shape)}; give a permutation or None for each of its "
            f"{len(shape)} axes"
        )
    return tuple(_axis(name, dim, entry, shape[dim]) for dim, entry in enumerate(axes))


def _axis(name: str, dim: int, entry: Any, size: int) -> Axis | None:
    if entry is None:
        return None
    if isinstance(entry, str):
        return Axis(entry, size)
    axis = entry if isinstance(entry, Axis) else Axis(*entry)
    if min(axis.units, axis.groups) < 1 or size % (axis.units * axis.groups):
        raise InvalidOption(
            f"{name}: axis {dim} has {size} entries, which are not {axis.units} units in {axis.groups} groups"
        )
    return axis


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, tied ones under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def shared(spec: Specification, model: nn.Module) -> Specification:
    """Return a specification in which tied tensors, which are one under several names, move alike.

    Raises:
        Incompatible: they would have to move differently.
    """
    tensors = dict(spec.tensors)
    for names in ties(model):
        known = {name: tensors[name] for name in names if name in tensors}
        first = next(iter(known), "")
        for other, axes in known.items():
            if axes != known[first]:
                raise Incompatible(
                    f"{first} and {other} are one tensor, on which two different permutations would act; "
                    "leave one of them out of the specification"
                )
        tensors.update({name: known[first] for name in names if known})
    return Specification(tensors)


def ties(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of each tensor that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(id(tensor), []).append(name)
    yield from (group for group in names.values() if len(group) > 1)


@torch.no_grad()
def permuted(model: nn.Module, spec: Specification, orders: Orders) -> nn.Module:
    """Return a copy of a model with its hidden units in another order; it computes the same.

    Args:
        model: any module.
        spec: which permutation acts where.
        orders: for each permutation, which unit comes to each place (units,).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> axes = {"0.weight": ["h", None], "0.bias": ["h"], "2.weight": [None, "h"]}
        >>> spec = specified(axes, {name: value.shape for name, value in model.state_dict().items()})
        >>> twin = permuted(model, spec, {"h": torch.tensor([2, 0, 1])})
        >>> x = torch.randn(4, 2)
        >>> torch.allclose(twin(x), model(x), atol=1e-6)
        True
    """
    twin = copy.deepcopy(model)
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        tensor.copy_(spec.permuted(name, tensor, orders))
    return twin


def check(
    model: nn.Module, spec: Specification, inputs: Any, *, seed: int = 0, tolerance: float | None = None
) -> float:
    """Permute a model at random and return how far its output moves, relative to the largest entry.

    Args:
        model: any module; it is left as it is. One in half precision is tried out in float32.
        spec: which permutation acts where.
        inputs: what the model is called with: a mapping by keywords, a tuple by position, else one argument.
        seed: of the permutations.
        tolerance: the most that counts as rounding; None is 100 units in the last place of float32, in which
            norms are often computed even in a model of float64.

    Raises:
        Incompatible: the output moves by more, so the specification is wrong.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> wrong = specified({"weight": [None, "h"]}, {"weight": (2, 3)})
        >>> check(model, wrong, torch.tensor([[1.0, 10.0, 100.0]]))
        Traceback (most recent call last):
        ...
        rankfold.errors.Incompatible: permuting the hidden units by this specification changes the output ...
    """
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in model.parameters()):
        model = copy.deepcopy(model).float()
    twin = permuted(model, spec, spec.drawn(seed))
    with calibrating(model, ()), calibrating(twin, ()), torch.no_grad():
        before, after = (_main_output(call(one, inputs)) for one in (model, twin))
    largest = float(before.abs().max()) or 1.0
    moved = float((after - before).abs().max()) / largest
    allowed = _ROUNDING if tolerance is None else tolerance
    if not moved <= allowed:
        raise Incompatible(
            f"permuting the hidden units by this specification changes the output by {moved:.1e} of its "
            f"largest entry, where rounding explains {allowed:.1e}: it lacks a tensor or moves one wrongly"
        )
    return moved


def _main_output(out: Any) -> Tensor:
    """Return the tensor that a model is called for: logits where there are any, else what comes first."""
    while not isinstance(out, Tensor):
        if isinstance(out, Mapping):
            out = out["logits"] if "logits" in out else next(iter(out.values()))
        elif isinstance(out, Sequence) and len(out):
            out = out[0]
        else:
            raise Incompatible(f"the model returns a {type(out).__name__}, which holds no tensor to compare")
    return out
