"""What initialisers and rank rules need from data, collected in one pass for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
from ..layers import adaptation_of, disabled
from ..statistics import Statistics, WeightStatistics, collect
from .recipe import Resolved
from .registry import needs_of

UNNAMED = "calibration"  # in a mapping of data sets, the one that a method reads without a name
Wanted = str | tuple[str, dict[str, Any]]  # as `collect` takes it
Collected = dict[str, dict[str, WeightStatistics]]


@dataclass(frozen=True)
class Calibration:
    """What a caller gives for calibration.

    Attributes:
        data: batches, statistics that were collected before, or a mapping of either by data set.
        learning_rate: of the training to come.
        loss: `loss(model, batch)`, where the model's output has none.
        progress: show a progress bar.
    """

    data: Iterable[Any] | Statistics | Mapping[str, Any] | None = None
    learning_rate: float | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    progress: bool = True


def needed(resolved: Resolved, asked: int | None, largest: int) -> dict[str, list[Wanted]]:
    """Return the statistics that a recipe reads, by data set; "" is the only one.

    Args:
        resolved: the recipe.
        asked: the rank that was asked for, or None.
        largest: the most that a weight may get.
    """
    names = needs_of(resolved.structure, resolved.options, largest)
    names += needs_of(resolved.init, resolved.init_options, largest)
    names += needs_of(resolved.ranks, resolved.ranks_options, asked or 0)
    sets: dict[str, list[Wanted]] = {}
    for need in names:
        name, options = (need, {}) if isinstance(need, str) else need
        statistic, _, data = name.partition("@")
        own = sets.setdefault(data, [])
        if (statistic, dict(options)) not in own:
            own.append((statistic, dict(options)))
    return sets


def check_given(resolved: Resolved, sets: Mapping[str, list[Wanted]], given: Calibration) -> None:
    """Refuse data or a learning rate that is missing, and what would be ignored.

    Raises:
        InvalidOption: something is missing.
        Incompatible: something would not be read.
    """
    point = resolved.recipe.text()
    readers = [m for m in (resolved.structure, resolved.init, resolved.ranks) if m is not None]
    if sets and given.data is None:
        names = sorted({need[0] for needs in sets.values() for need in needs})
        who = " and ".join(m.name for m in readers if m.traits["needs"])
        raise InvalidOption(f"{who} reads {' and '.join(names)}: pass {_wanted(sets)}")
    if given.data is not None and not sets:
        raise Incompatible(f"{point} reads no data; leave data= away")
    data = given.data
    named = isinstance(data, Mapping) and not isinstance(data, Statistics)
    wanted = {name or UNNAMED for name in sets} if set(sets) != {""} else {""}
    if sets and (set(data) if named else {""}) != wanted:  # type: ignore[arg-type]
        alone = "; the command line has one set of data only, so adapt in Python" if len(sets) > 1 else ""
        raise InvalidOption(f"{point} reads {len(sets)} set(s) of batches: pass {_wanted(sets)}{alone}")
    rate = resolved.init if resolved.init and resolved.init.traits["rate"] else None
    if rate is not None and given.learning_rate is None:
        raise InvalidOption(f"{rate.name} depends on the learning rate: pass lr=")
    if given.learning_rate is not None and rate is None:
        raise Incompatible(f"{point} does not depend on the learning rate; leave lr= away")
    if given.learning_rate is not None and not 0 < given.learning_rate < float("inf"):
        raise InvalidOption(f"lr must be a positive finite number, not {given.learning_rate}")


def _wanted(sets: Mapping[str, Any]) -> str:
    if set(sets) == {""}:
        return "data=batches"
    return "data={" + ", ".join(f'"{name or UNNAMED}": batches' for name in sorted(sets)) + "}"


def collected(
    model: nn.Module, paths: list[str], sets: Mapping[str, list[Wanted]], given: Calibration
) -> Collected:
    """Return the statistics of every path, by data set.

    Raises:
        RankfoldError: what `collect` raises.
    """
    found: Collected = {path: {} for path in paths}
    named = isinstance(given.data, Mapping) and not isinstance(given.data, Statistics)
    for name, needs in sets.items():
        data = given.data[name or UNNAMED] if named else given.data  # type: ignore[index]
        statistics = _statistics(model, data, needs, paths, given)
        for path in paths:
            found[path][name] = statistics[path]
    return found


def _statistics(
    model: nn.Module, data: Any, needs: list[Wanted], paths: list[str], given: Calibration
) -> Statistics:
    if isinstance(data, Statistics):
        data.check(model)
        missing = [path for path in paths if path not in data]
        if missing:
            raise InvalidOption(f"the statistics given do not cover {missing[0]} ({len(missing)} missing)")
        return data
    arguments: dict[str, Any] = {"targets": paths, "loss": given.loss, "progress": given.progress}
    if adaptation_of(model) is None:
        return collect(model, data, needs, **arguments)
    with disabled(model), torch.enable_grad():  # the adapter is made for the base
        return collect(model, data, needs, **arguments)
