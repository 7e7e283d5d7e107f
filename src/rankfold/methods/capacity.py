"""How much rank every weight gets, and how much a structure can hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidOption, InvalidRank
from .recipe import Resolved
from .rules import Unit
from .site import Place, Site


class RankCapped(UserWarning):
    """A preset or a default rank reached a weight that is too small for it; the weight got less."""


class LeftOut(UserWarning):
    """A rank rule gave a weight no rank, so it is not adapted."""


@dataclass(frozen=True)
class Allotment:
    """How much rank every weight gets.

    Attributes:
        ranks: by path; None where the structure has no rank.
        references: the rank that alpha is divided by, by path, where it is not the weight's own.
        asked: the rank that was asked for, which a rule shares out.
    """

    ranks: dict[str, int | None]
    references: dict[str, int]
    asked: int | None = None


def asked_rank(resolved: Resolved, rank: Any) -> int | None:
    """Return the rank that was asked for, or the structure's default; None where it has no rank.

    Raises:
        InvalidRank: it is no rank that the structure can have.
    """
    traits, name = resolved.structure.traits, resolved.structure.name
    rank = resolved.rank if rank is None else rank
    if traits["rank"] is None:
        if rank is not None:
            raise InvalidRank(f"{name} has no rank; leave rank= away")
        return None
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InvalidRank(f"rank must be a whole number of at least 1, not {rank!r}")
    multiple = traits["multiple"](resolved.options)
    if rank % multiple:
        raise InvalidRank(f"{name}: rank {rank} is not a multiple of {multiple}")
    return rank


def largest_rank(resolved: Resolved, rank: int | None) -> int:
    """Return the most that any weight may get where this rank was asked for."""
    if rank is None or resolved.ranks is None:
        return rank or 0
    return max(rank, int(resolved.ranks.traits["largest"](resolved.ranks_options, rank)))


def allotted_ranks(
    resolved: Resolved, sites: Mapping[str, Place], rank: int | None, explicit: bool, notes: list[Warning]
) -> Allotment:
    """Return the rank of every path, checked against what the structure can hold.

    Args:
        resolved: the recipe.
        sites: by path.
        rank: asked for; None takes the structure's default, which is capped wherever a weight is smaller.
        explicit: the weights were named, so a rank that one of them cannot hold is an error and not capped.
        notes: warnings are added for ranks that are capped and for weights that are left out.

    Raises:
        InvalidRank: a rank is impossible.
    """
    asked = asked_rank(resolved, rank)
    if asked is None:
        return Allotment(dict.fromkeys(sites), {})
    units = units_of(resolved, sites)
    if resolved.ranks is not None:
        return _shared(resolved, units, asked, notes)
    over = [u for u in units if u.limit is not None and asked > u.limit]
    if over and rank is not None and (explicit or len(over) == len(units)):
        raise InvalidRank(_too_high(resolved.structure.name, over[0], asked))
    ranks: dict[str, int | None] = {u.path: asked for u in units}
    capped = {u.path: _capped(resolved.structure.name, u) for u in over}
    notes += [
        RankCapped(note) for note in _grouped("rank capped to {}, all that the weight can hold", capped)
    ]
    return Allotment({**ranks, **capped}, {}, asked)


def units_of(resolved: Resolved, sites: Mapping[str, Place]) -> list[Unit]:
    """Return the weights as what takes part in sharing out a budget."""
    traits, blocks = resolved.structure.traits, blocks_of(sites)
    multiple, names = traits["multiple"](resolved.options), list(dict.fromkeys(blocks.values()))
    return [
        Unit(
            path=path,
            shape=site.shape if isinstance(site, Site) else (0, 0),
            depth=names.index(blocks[path]),
            blocks=len(names),
            limit=_limit(resolved, site),
            multiple=multiple,
            site=site,
        )
        for path, site in sites.items()
    ]


def blocks_of(sites: Iterable[str]) -> dict[str, str]:
    """Name the block that every weight lies in: its path up to the first number in it."""
    found = {path: re.match(r"(?:.*?\.)?\d+(?=\.|$)", path) for path in sites}
    return {path: match.group(0) if match else path for path, match in found.items()}


def _shared(resolved: Resolved, units: Sequence[Unit], rank: int, notes: list[Warning]) -> Allotment:
    rule, method = resolved.rule, resolved.ranks
    assert method is not None
    if rule is not None:
        shared = rule.share(units, rank)
    else:
        shared = method.build(units, rank, **resolved.ranks_options)
    ranks: dict[str, int | None] = {
        unit.path: _checked(method.name, unit, shared.get(unit.path, 0)) for unit in units
    }
    without = [path for path, given in ranks.items() if not given]
    if len(without) == len(units):
        raise InvalidOption(f"{method.name} gave no weight any rank; ask for a larger rank")
    notes += [LeftOut(f"{path}: {method.name} gave it no rank, so it is not adapted") for path in without]
    own = method.traits["scales"] == "own" if rule is None else rule.alpha_over == "first"
    references = {path: given if own else rank for path, given in ranks.items() if given}
    return Allotment(ranks, references, rank)


def _checked(name: str, unit: Unit, rank: Any) -> int:
    fits = isinstance(rank, int) and rank >= 0 and rank % unit.multiple == 0
    if not fits or (unit.limit is not None and rank > unit.limit):
        refused = f"{unit.path}: {name} gave it the rank {rank!r}"
        raise InvalidRank(_too_high(name, unit, rank) if fits else refused)
    return int(rank)


def _capped(name: str, unit: Unit) -> int:
    assert unit.limit is not None
    rank = unit.limit // unit.multiple * unit.multiple
    if not rank:
        raise InvalidRank(
            f"{unit.path}: {name} needs a rank of at least {unit.multiple}, more than the weight can hold"
        )
    return rank


def _grouped(sentence: str, found: Mapping[str, int]) -> list[str]:
    """Say the same of all paths with one value in one sentence."""
    groups: dict[int, list[str]] = {}
    for path, value in found.items():
        groups.setdefault(value, []).append(path)
    return [f"{', '.join(paths)}: {sentence.format(value)}" for value, paths in groups.items()]


def _limit(resolved: Resolved, site: Place) -> int | None:
    """Return the most that structure and initialiser can hold, or None where neither has a limit."""
    if not isinstance(site, Site):
        return None
    traits = [resolved.structure.traits, *([resolved.init.traits] if resolved.init else [])]
    return min((int(t["limit"](site.shape)) for t in traits if t["limit"] is not None), default=None)


def _too_high(name: str, unit: Unit, rank: int) -> str:
    shape = "x".join(map(str, unit.shape))
    room = f"rank {rank} is more than its weight ({shape}) can hold with {name}"
    return f"{unit.path}: {room}; choose rank <= {unit.limit}"
