"""A recipe: one point on the four axes structure, init, ranks and dynamics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import Incompatible, InvalidOption, UnknownMethod, near_names
from . import registry
from .registry import Method

Part = str | tuple[str, Mapping[str, Any]]


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

    Every part is a name, or (name, options).

    Example:
        >>> Recipe(structure="dora", init=("kaiming", {"a": 0.0})).text()
        'dora/kaiming'
    """

    structure: Part
    init: Part | None = None
    ranks: Part | None = None
    dynamics: Sequence[Part] = field(default_factory=tuple)

    def text(self) -> str:
        """Return the point as text, without options."""
        parts = [self.structure, self.init, self.ranks, *self.dynamics]
        return "/".join(split_part(p)[0] for p in parts if p is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        plain = {axis: getattr(self, axis) for axis in ("structure", "init", "ranks")}
        found: dict[str, Any] = {a: list(split_part(p)) for a, p in plain.items() if p is not None}
        return {**found, "dynamics": [list(split_part(p)) for p in self.dynamics]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` gave."""
        single = {a: tuple(data[a]) for a in ("structure", "init", "ranks") if data.get(a)}
        return cls(**single, dynamics=tuple(tuple(p) for p in data.get("dynamics", ())))


def parse_point(text: str) -> Recipe:
    """Return the recipe that a text such as "dora/pissa" means.

    Parts stand in any order; the axis is written (`ranks=eva`) where one name lives on two axes. Without a
    structure, it is lora.

    Raises:
        UnknownMethod: a part is no method.
        Incompatible: an axis is given twice, or a name is ambiguous.

    Example:
        >>> parse_point("pissa/dora")
        Recipe(structure='dora', init='pissa', ranks=None, dynamics=())
    """
    chosen: dict[str, str] = {}
    dynamics: list[str] = []
    for word in text.split("/"):
        axis, name = _axis_of(word.strip(), chosen)
        if axis == "dynamics":
            dynamics.append(name)
        elif axis in chosen:
            raise Incompatible(f"{text!r} gives two methods for {axis}: {chosen[axis]} and {name}")
        else:
            chosen[axis] = name
    return Recipe(chosen.pop("structure", "lora"), dynamics=tuple(dynamics), **chosen)


def _axis_of(word: str, chosen: Mapping[str, str]) -> tuple[str, str]:
    axis, _, name = word.rpartition("=")
    four = ("structure", "init", "ranks", "dynamics")
    if axis:
        if axis not in four:
            raise UnknownMethod(f"{axis!r} in {word!r} is no axis of a point{near_names(axis, four)}")
        registry.get(axis, name)
        return axis, name
    axes = [a for a in registry.axes_of(name) if a in four]
    if not axes:
        known = {m.name for m in registry.methods() if m.axis in four}
        raise UnknownMethod(f"no method is called {name!r}{near_names(name, known)}")
    if len(axes) > 1:
        raise Incompatible(
            f"{name!r} is of the axes {' and '.join(axes)}: write {axes[0]}={name} or {axes[1]}={name}"
        )
    return axes[0], name


@dataclass(frozen=True)
class Resolved:
    """A recipe with every method looked up and every option filled in."""

    recipe: Recipe
    structure: Method
    options: dict[str, Any]
    init: Method | None
    init_options: dict[str, Any]
    ranks: Method | None
    ranks_options: dict[str, Any]


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
    name, given = split_part(recipe.structure)
    structure = registry.get("structure", name)
    filled = structure.checked({**given, **options})
    initialiser, init_options = _resolve_init(structure, recipe.init)
    rule, rule_options = None, {}
    if recipe.ranks is not None:
        rule_name, rule_given = split_part(recipe.ranks)
        rule = registry.get("ranks", rule_name)
        rule_options = rule.checked(rule_given)
    for part in recipe.dynamics:
        registry.get("dynamics", split_part(part)[0])
    chosen = Recipe(
        (name, filled),
        (initialiser.name, init_options) if initialiser else None,
        (rule.name, rule_options) if rule else None,
        tuple(split_part(p) for p in recipe.dynamics),
    )
    return Resolved(chosen, structure, filled, initialiser, init_options, rule, rule_options)


def _resolve_init(structure: Method, asked: Part | None) -> tuple[Method | None, dict[str, Any]]:
    default = structure.traits["init"]
    if asked is None:
        if default is None:
            return None, {}
        asked = default
    name, options = split_part(asked)
    initialiser = registry.get("init", name)
    gives, starts = initialiser.traits["gives"], structure.traits["starts"]
    if not starts:
        raise Incompatible(f"{structure.name} has no factors to initialise, so {name} has no meaning for it")
    if gives not in starts:
        raise Incompatible(f"{structure.name} cannot start from {name}: {_why(gives, starts)}")
    return initialiser, initialiser.checked(options)


def _why(gives: str, starts: Sequence[str]) -> str:
    wanted = {
        "zero": "a product that is zero",
        "residual": "factors whose product is subtracted from the base",
        "displaced": "factors that move the base",
        "frame": "a basis of the weight",
    }
    return f"it gives {wanted[gives]}, and the structure needs {' or '.join(wanted[s] for s in starts)}"
