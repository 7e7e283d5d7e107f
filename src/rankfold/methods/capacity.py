"""How much rank every weight gets, and how much a structure can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InvalidRank
from ..layers import StructuredLayer
from .recipe import Resolved


class RankCapped(UserWarning):
    """A preset or a default rank reached a weight that is too small for it; the weight got less."""


def allotted_ranks(
    resolved: Resolved,
    layers: Mapping[str, StructuredLayer | None],
    rank: int | None,
    explicit: bool,
    notes: list[Warning],
) -> dict[str, int | None]:
    """Return the rank of every path, checked against what the structure can hold.

    Args:
        resolved: the recipe.
        layers: by path; None where an output is edited, not a weight.
        rank: asked for; None takes the structure's default, which is capped wherever a weight is smaller.
        explicit: the weights were named, so a rank that one of them cannot hold is an error and not capped.
        notes: a warning is added for every rank that is capped.

    Raises:
        InvalidRank: a rank is impossible.
    """
    traits, name = resolved.structure.traits, resolved.structure.name
    if traits["rank"] is None:
        if rank is not None:
            raise InvalidRank(f"{name} has no rank; leave rank= away")
        return dict.fromkeys(layers)
    multiple = traits["multiple"](resolved.options)
    shared = _shared_ranks(
        resolved, layers, _checked(name, traits["rank"] if rank is None else rank, multiple)
    )
    limits = {path: _limit(traits, layer) for path, layer in layers.items()}
    over = {p: limit for p, limit in limits.items() if limit is not None and shared[p] > limit}
    if over and rank is not None and (explicit or len(over) == len(layers)):
        path, limit = next(iter(over.items()))
        raise InvalidRank(_too_high(path, layers[path], shared[path], limit))
    capped = {path: _capped(path, name, limit, multiple) for path, limit in over.items()}
    notes += [RankCapped(f"{p}: rank capped to {r}, all that its weight can hold") for p, r in capped.items()]
    return {**shared, **capped}


def _checked(name: str, rank: Any, multiple: int) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InvalidRank(f"rank must be a whole number of at least 1, not {rank!r}")
    if rank % multiple:
        raise InvalidRank(f"{name}: rank {rank} is not a multiple of {multiple}")
    return rank


def _capped(path: str, name: str, limit: int, multiple: int) -> int:
    rank = limit // multiple * multiple
    if not rank:
        raise InvalidRank(
            f"{path}: {name} needs a rank of at least {multiple}, more than the weight can hold"
        )
    return rank


def _shared_ranks(resolved: Resolved, layers: Mapping[str, Any], rank: int) -> dict[str, int]:
    if resolved.ranks is None:
        return dict.fromkeys(layers, rank)
    shared: dict[str, int] = resolved.ranks.build(layers, rank, **resolved.ranks_options)
    return shared


def _limit(traits: Mapping[str, Any], layer: StructuredLayer | None) -> int | None:
    if traits["limit"] is None or layer is None:
        return None
    return int(traits["limit"](layer.shape))


def _too_high(path: str, layer: StructuredLayer | None, rank: int, limit: int | None) -> str:
    shape = "x".join(map(str, layer.shape)) if layer is not None else "?"
    return f"{path}: rank {rank} is more than its weight ({shape}) can hold; choose rank <= {limit}"
