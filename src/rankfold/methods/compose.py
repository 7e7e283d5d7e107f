"""Which points of the space make sense, decided from what the methods say of themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import Incompatible
from .registry import Method

_STARTS = {
    "zero": "a product that is zero",
    "residual": "factors whose product is subtracted from the base",
    "displaced": "factors that move the base",
    "frame": "two outer factors of the weight",
    "displaced frame": "two outer factors and a core that moves the base",
    "gated": "a product behind a gate that is zero",
}


@dataclass(frozen=True)
class Chosen:
    """A method with its options filled in."""

    method: Method
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    def trait(self, name: str) -> Any:
        """Return what the method declares of itself."""
        return self.method.traits[name]


def check(structure: Chosen, init: Chosen | None, ranks: Chosen | None, dynamics: Sequence[Chosen]) -> None:
    """Refuse a point that makes no sense.

    Raises:
        Incompatible: with the reason.
    """
    for reason in reasons(structure, init, ranks, dynamics):
        raise Incompatible(reason)


def reasons(
    structure: Chosen, init: Chosen | None, ranks: Chosen | None, dynamics: Sequence[Chosen]
) -> Iterator[str]:
    """Yield why a point makes no sense."""
    if init is not None:
        yield from _of_init(structure, init, ranks, dynamics)
    if ranks is not None:
        yield from _of_ranks(structure, ranks)
    for each in dynamics:
        yield from _of_dynamics(structure, ranks, each)
    yield from _between(dynamics)


def _of_init(
    structure: Chosen, init: Chosen, ranks: Chosen | None, dynamics: Sequence[Chosen]
) -> Iterator[str]:
    starts, gives = structure.trait("starts"), init.trait("gives")
    if not starts:
        yield f"{structure.name} has no factors to initialise, so {init.name} has no meaning for it"
    elif "gated" in gives and "zero" in starts:
        if ranks is None or not _gated(ranks) or not ranks.method.build.opens:  # type: ignore[attr-defined]
            yield f"{init.name} starts behind a gate that is zero, and only some rank rules open gates"
    elif not set(gives) & set(starts):
        given, wanted = (" or ".join(_STARTS[g] for g in names) for names in (gives, starts))
        yield (
            f"{structure.name} cannot start from {init.name}: it gives {given}, and the structure needs "
            f"{wanted}"
        )
    needed = init.trait("dynamics")
    if needed and needed not in [d.name for d in dynamics]:
        yield (
            f"{init.name} makes sense with the dynamics {needed} only: write "
            f"init={init.name}/dynamics={needed}"
        )


def _of_ranks(structure: Chosen, ranks: Chosen) -> Iterator[str]:
    if structure.trait("rank") is None:
        yield f"{structure.name} has no rank that {ranks.name} could share out"
    elif ranks.trait("needs") and structure.trait("activations"):
        yield f"{ranks.name} reads statistics of weights, and {structure.name} changes activations"
    elif _on_pairs(ranks) and not structure.trait("pairs"):
        acts = "gates" if _gated(ranks) else "changes"
        yield f"{ranks.name} {acts} terms of a trained product of two factors, and {structure.name} has none"
    elif ranks.trait("entries")(ranks.options) and not structure.trait("entries"):
        yield (
            f"{ranks.name} also prunes the trained leaf that meets the input, and {structure.name} has none; "
            "switch that part off in its options"
        )


def _gated(ranks: Chosen) -> bool:
    """Whether a rank rule puts gates between the factors."""
    return bool(ranks.trait("dynamic") and ranks.method.build.gated)  # type: ignore[attr-defined]


def _on_pairs(ranks: Chosen) -> bool:
    """Whether a rank rule changes the trained products of two factors."""
    return bool(ranks.trait("dynamic") and ranks.method.build.on_pairs)  # type: ignore[attr-defined]


def _of_dynamics(structure: Chosen, ranks: Chosen | None, each: Chosen) -> Iterator[str]:
    pairs, has = each.trait("pairs"), structure.trait("pairs")
    if each.trait("function"):
        yield f"{each.name} is no part of a training: call {each.trait('function')} after it"
    if pairs == "terms" and has != "terms":
        yield (
            f"{each.name} acts on a product of two trained factors that is a term of the weight, and "
            f"{structure.name} has none"
        )
    elif pairs and not has:
        yield f"{each.name} acts on a product of two trained factors, and {structure.name} has none"
    if each.trait("sides") and not structure.trait("sides"):
        yield f"{each.name} tells output side from input side, and {structure.name} trains on one only"
    if structure.trait("noisy") and not each.trait("noise"):
        yield f"{each.name} works without dropout, and {structure.name} draws noise between the factors"
    if each.trait("moves_base") and structure.trait("activations"):
        yield f"{each.name} moves changes into stored weights, and {structure.name} changes activations"
    if each.trait("moves_base") and structure.trait("scratch"):
        yield f"{each.name} moves changes into stored weights, and {structure.name} takes the place of those"
    if each.trait("wraps"):
        yield from _of_wrapping(structure, each)
    changed = ranks is not None and (_on_pairs(ranks) or ranks.trait("entries")(ranks.options))
    if ranks is not None and changed and not each.trait("gates"):
        does = "puts a gate between them" if _gated(ranks) else "changes them too"
        yield f"{each.name} needs the factors alone, and {ranks.name} {does}"


def _of_wrapping(structure: Chosen, each: Chosen) -> Iterator[str]:
    if not structure.trait("scratch"):
        yield f"{each.name} is for weights from scratch, and {structure.name} changes one that is there"
    elif structure.trait("nonlinear"):
        yield f"{each.name} needs the matrix of a weight, and {structure.name} has none"
    elif structure.trait("training") is not None:
        yield f"{structure.name} has a training of its own, beside which {each.name} has no meaning"


def _between(dynamics: Sequence[Chosen]) -> Iterator[str]:
    names = [d.name for d in dynamics]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        yield f"the dynamics {twice[0]} is given twice"
    for first, second in itertools.combinations(dynamics, 2):
        if first.trait("owns_step") and second.trait("owns_step"):
            yield f"{first.name} and {second.name} both replace the optimizer's step"
        for one, other in ((first, second), (second, first)):
            if one.trait("wraps") and other.trait("pairs") == "terms":
                yield (
                    f"{other.name} acts on products that are terms of the weight, and beside the map that "
                    f"{one.name} adds they are none"
                )
        if second.name in first.trait("excludes") or first.name in second.trait("excludes"):
            yield f"{first.name} and {second.name} undo each other's effect"
