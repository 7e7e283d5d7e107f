"""Tables of embeddings that are replaced by smaller forms, fitted to what they hold."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import Incompatible, InvalidOption, UnsupportedLayer
from ..layers import StructuredEmbedding, adaptation_of
from ..methods.limits import in_range
from ..methods.replace import replace
from ..methods.site import Site
from ..statistics import Statistics, collect
from ..statistics.calibrating import Progress
from ..statistics.finite import require_finite
from ..statistics.watched import Watched, watch
from ..weights import Dense, Weight
from ..weights.kernels import at_least_float32
from .report import Row
from .task import Task

Shape = tuple[int, int]
Sizes = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


class NoRoom(InvalidOption):
    """A table is too small for so small a share of it."""


@dataclass(frozen=True)
class Room:
    """How much of a table may remain.

    Attributes:
        keep: share of its bytes, in (0, 1).
        bits: of one of its numbers.
        ordered: the ids' places by frequency are stored, four bytes each; else ids are their own places.
    """

    keep: float
    bits: int = 32
    ordered: bool = False

    def numbers(self, shape: Shape) -> int:
        """Return how many of the table's numbers that is, apart from what the order takes."""
        taken = self.of_bits(shape[0], 32) if self.ordered else 0
        return int(self.keep * shape[0] * shape[1]) - taken

    def of_bits(self, count: int, width: int) -> int:
        """Return how many of the table's numbers so many codes of so many bits take."""
        return -(-count * width // self.bits)

    def taken(self, leaves: Mapping[str, Tensor]) -> int:
        """Return how many of the table's numbers leaves take, codes and orders included."""
        widths = [self.bits if v.is_floating_point() else 8 * v.element_size() for v in leaves.values()]
        return -(-sum(v.numel() * w for v, w in zip(leaves.values(), widths, strict=True)) // self.bits)


class Way(ABC):
    """One form of a table; its fields are the method's options."""

    reads_order: ClassVar[bool] = False  # where every id's place by frequency is looked up

    @abstractmethod
    def sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the shapes of the leaves by name, and the type of those that hold integers.

        Raises:
            NoRoom: the table is too small for that.
        """

    @abstractmethod
    def fit(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return the values of the leaves.

        Args:
            table: (vocabulary, d).
            room: that they may take.
            order: (vocabulary,), the place of every id, 0 the most frequent.
        """

    @abstractmethod
    def weight(self, leaves: Mapping[str, Dense], shape: Shape) -> Weight:
        """Return the expression."""

    def all_sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the shapes of the leaves, the order included where it is stored."""
        order: Sizes = {"order": ((shape[0],), torch.int32)} if room.ordered else {}
        return {**self.sizes(shape, room), **order}

    def fitted(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return the values of all leaves."""
        found = self.fit(table, room, order)
        return {**found, "order": order.to(torch.int32)} if room.ordered else found


def rows_in(room: Room, shape: Shape, least: int) -> int:
    """Return how many rows fit.

    Raises:
        NoRoom: fewer than `least`.
    """
    rows = room.numbers(shape) // shape[1]
    if rows < least:
        raise no_room(room, shape, least * shape[1])
    return rows


def no_room(room: Room, shape: Shape, least: int) -> NoRoom:
    """Return the refusal of a table of which at least so many numbers have to stay."""
    size = math.prod(shape)
    return NoRoom(
        f"keep={room.keep:g} leaves {max(0, room.numbers(shape)):,} of the {size:,} numbers of a table "
        f"{shape[0]}x{shape[1]}, and the least is {least:,}"
    )


def averaged(values: Tensor, slots: Tensor, count: int) -> Tensor:
    """Return the means of the rows that share a slot, (count, d), zeros where there are none."""
    total = values.new_zeros(count, *values.shape[1:]).index_add_(0, slots, values)
    times = torch.bincount(slots, minlength=count).clamp_min(1)
    return total / times.view(-1, *[1] * (values.dim() - 1)).to(values)


# From scratch -----------------------------------------------------------------------------------------


def table_from_scratch(site: Site, way: Way, keep: float, bits: int, ordered: bool = False) -> Weight:
    """Return the form of a table that takes the place of a weight, fitted to the weight's usual start."""
    in_range("a smaller table", "(0, 1]", keep=keep)
    room = Room(keep, bits, ordered)
    sizes = way.all_sizes(site.shape, room)
    if site.blank:
        values = {name: site.zeros(*size) for name, (size, _) in sizes.items()}
    else:
        order = torch.arange(site.shape[0], device=site.device)
        values = way.fitted(site.matrix(), room, order)
    leaves = {
        name: site.trained(values[name], name)
        if kind is None
        else Dense(values[name].to(site.device, kind), name, trainable=False)
        for name, (_, kind) in sizes.items()
    }
    return way.weight(leaves, site.shape)


# Compression ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fitted:
    """One table in a smaller form.

    Attributes:
        leaves: values by name.
        kept: numbers of the table that they take.
        error: relative, weighted by how often rows are met, where that is known.
        plain_error: relative Frobenius error.
    """

    leaves: Mapping[str, Tensor]
    kept: int
    error: float
    plain_error: float


def tables_of(task: Task) -> list[Watched]:
    """Return the targeted tables.

    Raises:
        Incompatible, UnsupportedLayer: one cannot be replaced.
    """
    if adaptation_of(task.model) is not None:
        raise Incompatible(
            "the model holds an adapter or was compressed already; rankfold.fold(model) first, then compress"
        )
    weights = watch(task.model, task.targets)
    for weight in weights:
        if not isinstance(weight.layer, StructuredEmbedding):
            raise UnsupportedLayer(
                f"{weight.path} is no embedding; {task.report.method} applies to tables that are looked up"
            )
        require_finite(weight.layer.matrix().detach(), f"{weight.path}: the weight")
    if len({weight.layer.stored().dtype for weight in weights}) > 1:
        raise Incompatible("the tables differ in their precision; compress one kind after the other, or cast")
    return weights


def frequencies(task: Task, weights: Sequence[Watched]) -> dict[str, Tensor]:
    """Return how often every row is looked up, by path, where there are data."""
    found = task.data
    if not isinstance(found, Statistics):
        if not found:
            return {}
        found = collect(
            task.model, task.batches(), ["token_frequency"], targets=[w.path for w in weights],
            progress=task.progress, seed=task.seed,
        )  # fmt: skip
    return {weight.path: found[weight.path].get("token_frequency") for weight in weights}


def order_of(frequency: Tensor) -> Tensor:
    """Return the place of every id, the most frequent first and ids of one frequency as they are.

    Example:
        >>> order_of(torch.tensor([0.1, 0.6, 0.3]))
        tensor([2, 0, 1])
    """
    return frequency.argsort(descending=True, stable=True).argsort()


def room_of(task: Task, weights: Sequence[Watched], way: Way, known: Mapping[str, Tensor]) -> Room:
    """Return how much of every table may remain."""
    bits = 8 * weights[0].layer.stored().element_size()
    return Room(task.keep, bits, way.reads_order and bool(known))


@torch.no_grad()
def fit_table(weight: Watched, way: Way, room: Room, frequency: Tensor | None) -> Fitted:
    """Fit one table.

    Raises:
        NoRoom: it is too small.
    """
    stored = weight.layer.matrix().detach()
    table = stored.to(at_least_float32(stored))
    order = torch.arange(len(table), device=table.device) if frequency is None else order_of(frequency)
    leaves = way.fitted(table, room, order.to(table.device))
    held = {name: Dense(value, name, trainable=False) for name, value in leaves.items()}
    lost = (table - way.weight(held, weight.layer.shape).dense()).square().sum(1)
    size = table.square().sum(1)
    often = torch.ones_like(size) if frequency is None else frequency.to(size)
    error = float(((often * lost).sum() / (often * size).sum().clamp_min(1e-30)).sqrt())
    return Fitted(leaves, room.taken(leaves), error, float((lost.sum() / size.sum().clamp_min(1e-30)).sqrt()))


def fit_tables(
    task: Task, weights: Sequence[Watched], way: Way, room: Room, known: Mapping[str, Tensor]
) -> tuple[dict[str, Fitted], dict[str, NoRoom]]:
    """Fit all tables that are large enough, and return why the others are not, both by path."""
    found: dict[str, Fitted] = {}
    refused: dict[str, NoRoom] = {}
    bar = Progress(task.progress, len(weights), task.report.method)
    for weight in weights if room.keep < 1 else ():
        try:
            found[weight.path] = fit_table(weight, way, room, known.get(weight.path))
        except NoRoom as error:
            refused[weight.path] = error
        bar.step()
    bar.close()
    return found, refused


def replace_tables(task: Task, name: str, way: Way) -> None:
    """Replace the targeted tables.

    Args:
        task: what is asked for.
        name: of the structure.
        way: in which form.
    """
    weights = tables_of(task)
    known = frequencies(task, weights)
    room = room_of(task, weights, way, known)
    found, refused = fit_tables(task, weights, way, room, known)
    if refused and not found:
        path, error = next(iter(refused.items()))
        raise NoRoom(f"{path}: {error}")
    task.report.notes += [f"{path} stays as it is: {error}" for path, error in refused.items()]
    install(task, weights, name, way, room, found)


def install(
    task: Task, weights: Sequence[Watched], name: str, way: Way, room: Room, found: Mapping[str, Fitted]
) -> None:
    """Put the forms in the places of the tables and report them."""
    shapes = {weight.path: weight.layer.shape for weight in weights}
    if found:
        record = {"method": task.report.method, "keep": task.keep, "options": dict(task.report.options)}
        replace(
            task.model,
            (name, _options(way, room)),
            dict.fromkeys(found),
            lambda path: found[path].leaves,
            seed=task.seed,
            record={"compressed": record},
        )
        if any(not value.is_floating_point() for fit in found.values() for value in fit.leaves.values()):
            task.report.notes.append("numbers that remain: integers, codes and orders count by their bytes")
    else:
        task.report.notes.append("nothing was compressed: keep leaves every table as it was")
    for path, shape in shapes.items():
        fit = found.get(path, Fitted({}, math.prod(shape), 0.0, 0.0))
        task.report.rows.append(Row(path, shape, None, fit.kept, fit.error, fit.plain_error))


def _options(way: Way, room: Room) -> dict[str, Any]:
    """Return the options of the structure; the seed is that of its adapter."""
    fields = asdict(way)  # type: ignore[call-overload]  # every way is a dataclass
    own = {key: value for key, value in fields.items() if key != "seed"}
    order = {"ordered": room.ordered} if way.reads_order else {}
    return {"keep": room.keep, "bits": room.bits, **order, **own}
