"""A recipe: one point on the four axes structure, init, ranks and dynamics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from ..errors import Incompatible, InvalidOption, UnknownMethod, near_names
from . import registry
from .compose import Chosen, check
from .registry import Method
from .rules import DynamicRanks, Dynamics

Part = str | tuple[str, Mapping[str, Any]]
_AIM = ("targets", "exclude", "rank")  # of a recipe, beside its parts


def split_part(part: Part) -> tuple[str, dict[str, Any]]:
    """Return name and options of a part.

    Raises:
        InvalidOption: the part is neither a name nor (name, options).
    """
    if isinstance(part, str):
        return part, {}
    try:
        name, options = part
        return str(name), dict(options)
    except (TypeError, ValueError):
        raise InvalidOption(f"{part!r} is neither a method's name nor (name, {{option: value}})") from None


@dataclass(frozen=True)
class Recipe:
    """One point of the space of adaptations.

    Args:
        structure: what shape the change has.
        init: where its factors start; None takes the paper's.
        ranks: how much rank each weight gets.
        dynamics: how its parameters move.
        targets: the weights that are meant where none are named, as `adapt` takes them in text; None takes
            the structure's default.
        exclude: names or patterns of what is left out of those targets, with everything inside.
        rank: the rank that is meant where none is given; None takes the structure's default.

    Every part is a name, or (name, options).

    Example:
        >>> Recipe(structure="dora", init=("kaiming", {"a": 0.0})).text()
        'dora/kaiming'
    """

    structure: Part
    init: Part | None = None
    ranks: Part | None = None
    dynamics: Sequence[Part] = field(default_factory=tuple)
    targets: str | Sequence[str] | None = None
    exclude: Sequence[str] = ()
    rank: int | None = None

    def text(self) -> str:
        """Return the point as text, without options."""
        parts = [self.structure, self.init, self.ranks, *self.dynamics]
        return "/".join(split_part(p)[0] for p in parts if p is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        plain = {axis: getattr(self, axis) for axis in ("structure", "init", "ranks")}
        found: dict[str, Any] = {a: list(split_part(p)) for a, p in plain.items() if p is not None}
        aim = {k: getattr(self, k) for k in _AIM if getattr(self, k) not in (None, ())}
        aim = {k: list(v) if isinstance(v, list | tuple) else v for k, v in aim.items()}
        return {**found, "dynamics": [list(split_part(p)) for p in self.dynamics], **aim}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` gave."""
        single: dict[str, Any] = {
            axis: tuple(data[axis]) for axis in ("structure", "init", "ranks") if data.get(axis)
        }
        aim = {key: data[key] for key in _AIM if data.get(key) is not None}
        return cls(**single, dynamics=tuple(tuple(p) for p in data.get("dynamics", ())), **aim)


def parse_point(text: str) -> Recipe:
    """Return the recipe that a text such as "dora/pissa" means.

    Parts stand in any order; the axis is written (`ranks=eva`) where one name lives on two axes. Without a
    structure, it is the one that the initialiser's paper uses, or lora. One of the parts may be a recipe of
    the catalogue; the others fill what it leaves open.

    Raises:
        UnknownMethod: a part is no method.
        Incompatible: an axis is given twice, or a name is ambiguous.

    Example:
        >>> parse_point("pissa/dora")
        Recipe(structure='dora', init='pissa', ranks=None, dynamics=(), targets=None, exclude=(), rank=None)
    """
    chosen: dict[str, Any] = {}
    dynamics: list[Part] = []
    for word in text.split("/"):
        if not word.strip():
            raise UnknownMethod(f"a part of the point {text!r} is empty; write names between the slashes")
        axis, name = _axis_of(word.strip(), chosen)
        if axis == "dynamics":
            dynamics.append(name)
        elif axis in chosen:
            raise Incompatible(f"{text!r} gives two methods for {axis}: {chosen[axis]} and {name}")
        else:
            chosen[axis] = name
    if "recipe" in chosen:
        return _filled(chosen.pop("recipe"), chosen, dynamics)
    structure = chosen.pop("structure", None) or _usual_structure(chosen.get("init"))
    return Recipe(structure, dynamics=tuple(dynamics), **chosen)


def _filled(name: str, chosen: Mapping[str, str], dynamics: Sequence[Part]) -> Recipe:
    """Return a recipe of the catalogue with further parts on the axes that it leaves open."""
    known = named(name)
    for axis, part in chosen.items():
        if getattr(known, axis) is not None:
            raise Incompatible(
                f"{name} is a recipe with {split_part(getattr(known, axis))[0]} for {axis}, not {part}"
            )
    return replace(known, **chosen, dynamics=(*known.dynamics, *dynamics))  # type: ignore[arg-type]


def named(name: str) -> Recipe:
    """Return what a recipe of the catalogue means.

    Raises:
        UnknownMethod: there is none of that name, or one of its parts is no method.
        InvalidOption: what it means is no recipe.

    Example:
        >>> named("ecg-lora").text()
        'lora'
    """
    known = registry.get("recipe", name).build()
    if not isinstance(known, Recipe):
        raise InvalidOption(f"the recipe {name} means {known!r}, which is no Recipe")
    for axis in ("structure", "init", "ranks"):
        if getattr(known, axis) is not None:
            get = registry.structure_named if axis == "structure" else partial(registry.get, axis)
            get(split_part(getattr(known, axis))[0])
    for part in known.dynamics:
        registry.get("dynamics", split_part(part)[0])
    return known


def _usual_structure(init: str | None) -> str:
    return "lora" if init is None else str(registry.get("init", init).traits["structure"])


def _axis_of(word: str, chosen: Mapping[str, str]) -> tuple[str, str]:
    axis, _, name = word.rpartition("=")
    known_axes = ("structure", "pretrain", "init", "ranks", "dynamics", "recipe")
    if axis:
        if axis not in known_axes:
            listed = near_names(axis, known_axes) or f"; its axes are {', '.join(known_axes)}"
            raise UnknownMethod(f"{axis!r} in {word!r} is no axis of a point{listed}")
        registry.get(axis, name)
        return _IN_A_RECIPE.get(axis, axis), name
    axes = [a for a in registry.axes_of(name) if a in known_axes]
    if not axes:
        known = {m.name for m in registry.methods() if m.axis in known_axes}
        raise UnknownMethod(f"no method is called {name!r}{near_names(name, known)}")
    if len(axes) > 1:
        raise Incompatible(
            f"{name!r} is of the axes {' and '.join(axes)}: write {axes[0]}={name} or {axes[1]}={name}"
        )
    return _IN_A_RECIPE.get(axes[0], axes[0]), name


_IN_A_RECIPE = {"pretrain": "structure"}  # a weight trained from scratch stands where a change would


@dataclass(frozen=True)
class Resolved:
    """A recipe with every method looked up and every option filled in.

    Attributes:
        recipe: the same, as plain names and options.
        structure, options: what shape the change has.
        init, init_options: where its factors start, or None.
        ranks, ranks_options: how much rank each weight gets, or None.
        rule: the dynamic rank rule, made with its options, or None.
        training: what the structure's own paper does around every step, or None.
        dynamics: how the parameters move, each made with its options, by name.
        targets, exclude: the weights that are meant where none are named.
        rank: the rank that is meant where none is given, or None where the structure has none.
    """

    recipe: Recipe
    structure: Method
    options: dict[str, Any]
    init: Method | None
    init_options: dict[str, Any]
    ranks: Method | None
    ranks_options: dict[str, Any]
    rule: DynamicRanks | None
    training: Dynamics | None
    dynamics: dict[str, Dynamics]
    targets: str | Sequence[str]
    exclude: Sequence[str]
    rank: int | None

    @property
    def riding(self) -> dict[str, Dynamics]:
        """Everything that rides on the optimizer's step, by the scope of its memory.

        Rank rules see gradients first and act last after a step; what the structure does is within that.
        """
        found: dict[str, Dynamics] = {}
        if self.rule is not None and self.ranks is not None:
            found[f"ranks={self.ranks.name}"] = self.rule
        if self.training is not None:
            found[f"structure={self.structure.name}"] = self.training
        return {**found, **self.dynamics}

    @property
    def acts(self) -> bool:
        """Whether something has to ride on the optimizer's step; rates by side do not."""
        phases = ("gradients_ready", "stepped")
        return any(
            getattr(type(rule), phase) is not getattr(Dynamics, phase)
            for rule in self.riding.values()
            for phase in phases
        )

    @property
    def moves_base(self) -> bool:
        """Whether training moves the stored weights themselves."""
        return any(registry.get("dynamics", name).traits["moves_base"] for name in self.dynamics)


def resolve(method: str | Recipe, options: Mapping[str, Any]) -> Resolved:
    """Look up every part of a recipe and refuse what cannot mean anything.

    Args:
        method: a recipe, or a point as text.
        options: further options of the structure.

    Raises:
        UnknownMethod: a part is no method.
        InvalidOption: an option is unknown or impossible.
        Incompatible: the parts do not go together.
    """
    recipe = parse_point(method) if isinstance(method, str) else method
    if not isinstance(recipe, Recipe):
        raise InvalidOption(f"a method is a text such as 'dora/pissa' or a Recipe, not {method!r}")
    structure = _structure(recipe, options)
    ranks = _choose("ranks", recipe.ranks)
    dynamics = [chosen for part in recipe.dynamics if (chosen := _choose("dynamics", part)) is not None]
    init = _choose("init", _init_part(structure, [*([ranks] if ranks else []), *dynamics], recipe.init))
    check(structure, init, ranks, dynamics)
    rule = ranks.method.build(**ranks.options) if ranks and ranks.trait("dynamic") else None
    return Resolved(
        Recipe(
            (structure.name, dict(structure.options)),
            _part(init),
            _part(ranks),
            tuple((d.name, dict(d.options)) for d in dynamics),
        ),
        structure.method,
        dict(structure.options),
        init.method if init else None,
        dict(init.options) if init else {},
        ranks.method if ranks else None,
        dict(ranks.options) if ranks else {},
        rule,
        _own_training(structure),
        {d.name: d.method.build(**d.options) for d in dynamics},
        recipe.targets or structure.trait("targets"),
        recipe.exclude,
        structure.trait("rank") if recipe.rank is None else recipe.rank,
    )


def _own_training(structure: Chosen) -> Dynamics | None:
    """Return what the structure does during training, made with its options."""
    build = structure.trait("training")
    if build is None:
        return None
    known = {f.name for f in fields(build)}
    made: Dynamics = build(**{key: value for key, value in structure.options.items() if key in known})
    return None if made.idle else made


def _structure(recipe: Recipe, options: Mapping[str, Any]) -> Chosen:
    name, given = split_part(recipe.structure)
    method = registry.structure_named(name)
    return Chosen(method, method.checked({**given, **options}))


def _choose(axis: str, part: Part | None) -> Chosen | None:
    if part is None:
        return None
    name, given = split_part(part)
    method = registry.get(axis, name)
    return Chosen(method, method.checked(given))


def _part(chosen: Chosen | None) -> Part | None:
    return None if chosen is None else (chosen.name, dict(chosen.options))


def _init_part(structure: Chosen, others: Sequence[Chosen], asked: Part | None) -> Part | None:
    """Return the start asked for, else that of the rank rule's, a dynamics' or the structure's paper."""
    if asked is not None:
        return asked
    own: list[Part] = [other.trait("init") for other in others if other.trait("init") is not None]
    if own and structure.trait("pairs") and "zero" in structure.trait("starts"):
        return own[0]
    return structure.trait("init")  # type: ignore[no-any-return]
