"""Merging adapters: linear rules put factors side by side, others work on one weight's change at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption, InvalidRank, MissingPath
from ..formats.changes import Changes, read_changes
from ..layers import adaptation_of, require
from ..linalg import factored_svd, truncated_svd
from ..methods.persist import save
from .models import ADAPTER_FILES, Model, ModelFolder, Shape, open_model
from .parts import Parts
from .report import MergeReport
from .sources import Sources, checked_weights
from .task import Task

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter that is merged, and what a sentence calls it."""

    label: str
    changes: Changes


def gathered(models: Any, names: Sequence[str] | None, base: Any) -> list[Loaded] | None:
    """Return the adapters that are meant, or None where it is models.

    Args:
        models: as `merge` takes them.
        names: of adapters in the one model given.
        base: as `merge` takes it; some adapters are read with its help.

    Raises:
        Incompatible: adapters and models are mixed.
        MissingPath: there is no such folder.
        InvalidOption: names are given and not one adapted model.
    """
    if names is not None or (isinstance(models, nn.Module) and adaptation_of(models) is not None):
        if not isinstance(models, nn.Module):
            raise InvalidOption("adapters= names adapters in one adapted model; pass that model alone")
        return _of_model(models, names)
    several = [models] if isinstance(models, nn.Module | str | Path | Changes) else list(models)
    found = [isinstance(one, Changes) or is_adapter(one) for one in several]
    if not any(found):
        return None
    if not all(found):
        _refuse_mixture(several[found.index(True)], several[found.index(False)])
    if isinstance(base, str | Path) and not Path(base).is_dir():
        raise MissingPath(f"there is no model folder {base}")
    return [
        Loaded(_label(one, n), one if isinstance(one, Changes) else _read(one, base))
        for n, one in enumerate(several, start=1)
    ]


def _refuse_mixture(adapter: Any, model: Any) -> None:
    open_model(model, "the other")  # which says what it is where it is no model either
    kind = "a file, which can be an adapter only," if _is_file(adapter) else "an adapter"
    raise Incompatible(
        f"{_label(adapter, 1)} is {kind} and {_label(model, 2)} a model; merge adapters with adapters, and "
        "folders of models with such folders"
    )


def _is_file(path: Any) -> bool:
    return isinstance(path, str | Path) and Path(path).is_file()


def is_adapter(path: object) -> bool:
    """Say whether a path is that of an adapter: a folder with an adapter's description, or a file."""
    if not isinstance(path, str | Path):
        return False
    place = Path(path)
    return place.is_file() or any((place / name).is_file() for name in ADAPTER_FILES)


def merge_changes(
    adapters: Sequence[Loaded],
    task: Task,
    *,
    base: nn.Module | str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    strict: bool = False,
    data: Any = None,
    loss: Callable[..., Tensor] | None = None,
    seed: int = 0,
) -> tuple[Changes, MergeReport]:
    """Return the merged changes and the report.

    A linear rule's result is exact: `[c_1 B_1 ... c_T B_T] [A_1; ...; A_T]`. Any other rule sees the dense
    changes of one weight at a time, over a base of zeros, and its result is cut to a rank again.

    Raises:
        Incompatible: two adapters change other shapes or kinds of a weight; in strict mode also where one
            lacks a weight that another changes, or they name different bases.
        InvalidRank: the rank is below 1, or more than a weight can have.
    """
    shares = checked_weights(weights, len(adapters))
    task.check(len(adapters), has_base=True)
    notes = list(_differences(adapters, strict))
    spaces = _spaces(adapters)
    _check_rank(rank, spaces)
    kind = dtype or _dtype_of(adapters)
    report = MergeReport(
        method=task.rule.name, options=task.options, models=[adapter.label for adapter in adapters],
        base=next((adapter.changes.base for adapter in adapters if adapter.changes.base), ""),
        weights=list(shares), seed=seed, dtype=_name(kind), inputs=_stored(adapters), notes=notes,
    )  # fmt: skip
    settings = {"weights": shares, "data": data, "loss": loss, "seed": seed}
    cut = _concatenated if task.rule.traits["linear"] else _refactored
    pairs = {}
    for path, pair, error in cut(adapters, task, rank, spaces, settings):
        pairs[path] = (pair[0].to(kind).contiguous(), pair[1].to(kind).contiguous())
        width = pair[0].shape[1]
        report.rows.append({"tensor": path, "rank": width, "exact": error == 0, "error": error})
    whole = dict(_merged_whole(adapters, task, base, shares, seed))
    first = adapters[0].changes
    merged = Changes(
        {path: pairs[path] for path in spaces},
        {path: space.kind for path, space in spaces.items()},
        {path: space.window for path, space in spaces.items() if space.window},
        whole, report.base, f"a merge by {task.rule.name}", first.flattened,
        {path: other for adapter in adapters for path, other in adapter.changes.tied.items()},
    )  # fmt: skip
    report.bytes = sum(t.nbytes for pair in pairs.values() for t in pair) + sum(
        t.nbytes for t in whole.values()
    )
    return merged, report


# What adapters are, and whether they fit each other ----------------------------------------------------


@dataclass(frozen=True)
class _Space:
    """The weight that a change belongs to, as the adapters describe it."""

    shape: tuple[int, int]
    kind: str
    window: tuple[int, ...]
    ranks: int


def _spaces(adapters: Sequence[Loaded]) -> dict[str, _Space]:
    """Return every weight that an adapter changes, and the sum of the ranks.

    Raises:
        Incompatible: two disagree on what it is.
    """
    found: dict[str, _Space] = {}
    owner: dict[str, str] = {}
    for adapter in adapters:
        changes = adapter.changes
        for path in changes.paths:
            own = changes.shape(path), changes.kinds[path], changes.windows.get(path, ())
            known = found.setdefault(path, _Space(*own, 0))
            if own != (known.shape, known.kind, known.window):
                one, two = (f"{'x'.join(map(str, s))} {k}" for s, k in ((known.shape, known.kind), own[:2]))
                raise Incompatible(
                    f"{path} is {one} in {owner[path]} and {two} in {adapter.label}: they change other models"
                )
            owner.setdefault(path, adapter.label)
            found[path] = replace(known, ranks=known.ranks + changes.rank(path))
    if not found:
        raise Incompatible("the adapters change no weight")
    return found


def _differences(adapters: Sequence[Loaded], strict: bool) -> Iterator[str]:
    """Yield what a reader should know of how the adapters differ.

    Raises:
        Incompatible: they do, and must not.
    """
    notes = [*_other_bases(adapters), *_other_targets(adapters)]
    if strict and notes:
        raise Incompatible(f"{notes[0]}; leave strict away to merge them so")
    if len({adapter.changes.flattened for adapter in adapters}) > 1:
        raise Incompatible(
            "some adapters name weights by flattened names, which only the model undoes; pass it as base="
        )
    yield from notes


def _other_bases(adapters: Sequence[Loaded]) -> Iterator[str]:
    known = [adapter for adapter in adapters if adapter.changes.base]
    for other in known[1:]:
        if other.changes.base != known[0].changes.base:
            first = known[0]
            yield (
                f"{first.label} was made for {first.changes.base} and {other.label} for {other.changes.base}"
            )


def _other_targets(adapters: Sequence[Loaded]) -> Iterator[str]:
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.changes.paths)
    for adapter in adapters:
        absent = [path for path in paths if path not in adapter.changes.pairs]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            yield f"{adapter.label} does not change {absent[0]}{more}, which counts as a change of zero"


def _check_rank(rank: int | None, spaces: Mapping[str, _Space]) -> None:
    if rank is not None and (type(rank) is not int or rank < 1):
        raise InvalidRank(f"rank must be a whole number of at least 1, not {rank!r}")
    most = max(min(space.shape) for space in spaces.values())
    if rank is not None and rank > most:
        raise InvalidRank(f"rank {rank} is more than any of the weights can have, which is {most}")


# The two ways of merging -------------------------------------------------------------------------------

_Cut = tuple[str, Pair, float]


def _concatenated(
    adapters: Sequence[Loaded],
    task: Task,
    rank: int | None,
    spaces: Mapping[str, _Space],
    settings: Mapping[str, Any],
) -> Iterator[_Cut]:
    """Yield [c_t B_t] and [A_t] of every weight, squeezed where a smaller rank is asked for or possible."""
    factors = task.coefficients(settings["weights"])
    for path, space in spaces.items():
        held = [
            (adapter.changes.pairs[path], c)
            for adapter, c in zip(adapters, factors, strict=True)
            if path in adapter.changes.pairs
        ]
        up = torch.cat([c * _wide(pair[0]) for pair, c in held], 1)
        down = torch.cat([_wide(pair[1]) for pair, _ in held], 0)
        most = min(space.shape)
        wanted = most if rank is None else min(rank, most)
        if up.shape[1] <= wanted:
            yield path, (up, down), 0.0
        else:
            yield path, *_squeezed(up, down, wanted, exact=wanted == most)


def _squeezed(up: Tensor, down: Tensor, rank: int, exact: bool) -> tuple[Pair, float]:
    left, values, right = factored_svd(up, down)
    return _even(left, values, right, rank), 0.0 if exact else _error(values, rank)


def _refactored(
    adapters: Sequence[Loaded],
    task: Task,
    rank: int | None,
    spaces: Mapping[str, _Space],
    settings: Mapping[str, Any],
) -> Iterator[_Cut]:
    """Yield the best factors of the rule's result on dense changes, one weight after the other."""
    tensors = {path: Shape(space.shape, _precision(adapters, path)) for path, space in spaces.items()}
    models = [_DenseChanges(adapter.label, adapter.changes, tensors) for adapter in adapters]
    zero = _DenseChanges("the base", Changes({}), tensors)
    with Sources(models, base=zero, **settings) as sources:
        for path, merged, _ in task.merged(sources):
            most = min(merged.shape)
            wanted = min(spaces[path].ranks if rank is None else rank, most)
            left, values, right = truncated_svd(merged, most)
            yield path, _even(left, values, right, wanted), 0.0 if wanted == most else _error(values, wanted)


class _DenseChanges:
    """An adapter as a model: the tensors are its changes, formed when they are read."""

    def __init__(self, label: str, changes: Changes, tensors: Mapping[str, Shape]) -> None:
        self.label, self.tensors, self._changes = label, tensors, changes
        self.config: Mapping[str, Any] = {}

    def read(self, name: str) -> Tensor:
        """Return the change of one weight, zero where there is none."""
        if name not in self._changes.pairs:
            return torch.zeros(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        up, down = self._changes.pairs[name]
        return _wide(up) @ _wide(down)

    def module(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Refuse."""
        raise Incompatible("this method needs a live model, and adapters are apart from any; fold them first")


def _even(left: Tensor, values: Tensor, right: Tensor, rank: int) -> Pair:
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _error(values: Tensor, rank: int) -> float:
    total = float(torch.linalg.vector_norm(values))
    lost = float(torch.linalg.vector_norm(values[rank:]))
    return lost / total if lost > total * torch.finfo(values.dtype).eps * len(values) else 0.0


# Modules trained whole ---------------------------------------------------------------------------------


def _merged_whole(
    adapters: Sequence[Loaded], task: Task, base: Any, weights: Sequence[float], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that replace the model's own: the one that all have, or merged over the base's.

    Raises:
        Incompatible: they differ, and the base that tells what was changed is missing.
    """
    names = dict.fromkeys(name for adapter in adapters for name in adapter.changes.whole)
    origin: Model | None = open_model(base, "the base") if names and base is not None else None
    for name in names:
        held = [adapter.changes.whole.get(name) for adapter in adapters]
        own = [tensor for tensor in held if tensor is not None]
        if len(own) == len(held) and all(torch.equal(own[0], other) for other in own):
            yield name, own[0]
            continue
        if origin is None or name not in origin.tensors or task.rule.traits["whole"]:
            raise Incompatible(
                f"{name} was trained whole and differs between the adapters, so that it is merged over the "
                "base's; pass base= and a method that works tensor by tensor"
            )
        before = _wide(origin.read(name))
        models = tuple(before if tensor is None else _wide(tensor) for tensor in held)
        yield name, task.one(Parts(name, models, tuple(weights), before, seed)).to(own[0].dtype)


# Reading -----------------------------------------------------------------------------------------------


def _of_model(model: nn.Module, names: Sequence[str] | None) -> list[Loaded]:
    """Return adapters of a model, by way of the form in which they are saved, which knows every method."""
    adaptation = require(model)
    chosen = list(adaptation.adapters) if names is None else list(names)
    if not chosen:
        raise InvalidOption("adapters= names no adapter")
    found = []
    with tempfile.TemporaryDirectory(prefix="rankfold-merge-") as room:
        for name in chosen:
            folder = save(model, Path(room) / "adapter", name, overwrite=True)
            found.append(Loaded(name, read_changes(folder, model)))
    return found


def _read(path: Any, base: Any) -> Changes:
    """Return the changes of a file or folder, with the help of the base where they need it."""
    if isinstance(base, nn.Module):
        return read_changes(path, base)
    try:
        changes = read_changes(path)
    except Incompatible:
        if base is None:
            raise
        return read_changes(path, ModelFolder(base).module({}))
    if changes.flattened and base is not None:
        return read_changes(path, ModelFolder(base).module({}))
    return changes


def _label(one: Any, number: int) -> str:
    return (
        str(one)
        if isinstance(one, str | Path)
        else f"adapter {number}"
        if isinstance(one, Changes)
        else "a module"
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _precision(adapters: Sequence[Loaded], path: str) -> torch.dtype:
    kinds = [t.dtype for adapter in adapters for t in adapter.changes.pairs.get(path, ())]
    return torch.float64 if torch.float64 in kinds else torch.float32


def _dtype_of(adapters: Sequence[Loaded]) -> torch.dtype:
    """Return the type of the first factor, which the result has too."""
    return next(up.dtype for adapter in adapters for up, _ in adapter.changes.pairs.values())


def _stored(adapters: Sequence[Loaded]) -> str:
    """Return the types of all factors."""
    factors = (factor for adapter in adapters for pair in adapter.changes.pairs.values() for factor in pair)
    return "+".join(sorted({_name(factor.dtype) for factor in factors}))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
