"""The space of points: which parts of two axes go together, and with what sentence the others are refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import Incompatible
from .recipe import Part, Recipe, resolve
from .registry import Method, get, methods

AXES = ("structure", "init", "ranks", "dynamics")


@dataclass(frozen=True)
class Verdict:
    """Whether two parts of a point go together.

    Attributes:
        first, second: the methods, of two axes.
        recipe: the point that was asked about.
        reason: why it is refused, or "" if it is accepted.
    """

    first: Method
    second: Method
    recipe: Recipe
    reason: str

    @property
    def accepted(self) -> bool:
        """Whether the point makes sense."""
        return not self.reason

    def to_dict(self) -> dict[str, object]:
        """Return the verdict as plain data."""
        return {
            self.first.axis: self.first.name,
            self.second.axis: self.second.name,
            "point": self.recipe.text(),
            "accepted": self.accepted,
            "reason": self.reason,
        }


def pairs() -> Iterator[Verdict]:
    """Yield the verdict on every pair of methods of two axes.

    A pair without a structure is asked about with lora, or with the structure of the initialiser's paper, or
    with low-rank where one of the two is for weights trained from scratch; a pair with an initialiser that
    needs a dynamics with that dynamics.
    """
    for one, other in itertools.combinations(AXES, 2):
        for first, second in itertools.product(parts_on(one), parts_on(other)):
            yield judge(first, second)


def parts_on(axis: str) -> list[Method]:
    """Return the methods that stand on an axis of a point; weights trained from scratch are structures."""
    scratch = methods("pretrain") if axis == "structure" else []
    return methods(axis) + [method for method in scratch if "scratch" in method.traits]


def axis_of(method: Method) -> str:
    """Return the axis of a point on which a method stands, or its own where it is no part of one.

    Example:
        >>> from rankfold import find_method
        >>> axis_of(find_method("sltrain")), axis_of(find_method("galore"))
        ('structure', 'optim')
    """
    return "structure" if "scratch" in method.traits else method.axis


def judge(first: Method, second: Method) -> Verdict:
    """Return whether two methods of two axes go together."""
    recipe = point([first, second])
    return Verdict(first, second, recipe, refusal(recipe))


def point(parts: Sequence[Method]) -> Recipe:
    """Return the recipe of methods of different axes, with the options without which they cannot be used."""
    chosen: dict[str, Part] = {axis_of(m): part_of(m) for m in parts if m.axis != "dynamics"}
    dynamics = [part_of(m) for m in parts if m.axis == "dynamics"]
    init = next((m for m in parts if m.axis == "init"), None)
    if init is not None:
        needed = init.traits["dynamics"]
        if needed and needed not in [m.name for m in parts if m.axis == "dynamics"]:
            dynamics.append(part_of(get("dynamics", needed)))
        chosen.setdefault("structure", part_of(get("structure", init.traits["structure"])))
    from_scratch = any(m.traits.get("wraps") for m in parts)
    structure = chosen.pop("structure", "low-rank" if from_scratch else "lora")
    return Recipe(structure, chosen.get("init"), chosen.get("ranks"), tuple(dynamics))


def part_of(method: Method) -> Part:
    """Return a method with the options without which it cannot be used."""
    example = method.traits.get("example", {})
    return (method.name, dict(example)) if example else method.name


def refusal(recipe: Recipe) -> str:
    """Return the sentence with which a point is refused, or "" if it is accepted."""
    try:
        resolve(recipe, {})
    except Incompatible as reason:
        return str(reason)
    return ""


def table() -> str:
    """Return, for every method, what it goes with on the other axes and why not with the rest."""
    verdicts = list(pairs())
    lines: list[str] = []
    for one, other in itertools.combinations(AXES, 2):
        lines += [f"{one} x {other}", ""]
        for first in parts_on(one):
            mine = [v for v in verdicts if v.first is first and v.second.axis == other]
            lines += _row(first.name, mine)
        lines.append("")
    return "\n".join(lines)


def _row(name: str, mine: Sequence[Verdict]) -> list[str]:
    accepted = [v.second.name for v in mine if v.accepted]
    refused = [v.second.name for v in mine if not v.accepted]
    if not refused:
        return [f"  {name:<14} with all"]
    if not accepted:
        return [f"  {name:<14} with none"]
    few, word = (accepted, "with") if len(accepted) <= len(refused) else (refused, "with all but")
    return [f"  {name:<14} {word} {', '.join(few)}"]
