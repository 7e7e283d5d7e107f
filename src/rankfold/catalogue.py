"""The catalogue: every method says what it is by registering itself, and nothing else has to be edited.

A method is a function with a decorator. Its options are its keyword-only parameters, its defaults theirs;
title, year, arXiv id and formula go into the catalogue, the command line and the documentation. Third
parties register theirs through the entry point group `rankfold.methods`. What the axes of an adaptation add
is in `methods.registry`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import InvalidOption, UnknownMethod, near_names

AXES = (
    "structure", "init", "ranks", "dynamics", "optim", "pretrain", "compress", "merge", "continual",
    "federated", "edit", "analysis", "layers", "numerics", "recipe",
)  # fmt: skip
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\+?")


@dataclass(frozen=True)
class StepZero:
    """What a method promises of the model's output before the first step.

    Attributes:
        kind: "exact" (the base's output to the last bit), "near" (within the tolerance, relative to the
            largest output), or "other".
        tolerance: for "near".
        note: for "other": what the output is instead; otherwise with which options the promise holds, where
            not with all.
        square: for "other": of square weights only; other weights start at the base.
    """

    kind: str
    tolerance: float = 0.0
    note: str = ""
    square: bool = False

    def __str__(self) -> str:
        """Return the promise as a phrase."""
        if self.kind == "other":
            return self.note
        given = f" {self.note}" if self.note else ""
        if self.kind == "near":
            return f"the base's output within {self.tolerance:g} of its largest entry{given}"
        return f"exactly the base's output{given}"


EXACT = StepZero("exact")


def exact_base(note: str) -> StepZero:
    """Promise the base's output to the last bit with the options that the note names, "with ..."."""
    return StepZero("exact", note=note)


def near_base(tolerance: float, note: str = "") -> StepZero:
    """Promise the base's output within a tolerance relative to the largest output.

    A note names the options that it holds with, "with ...".
    """
    return StepZero("near", tolerance, note)


def not_base(note: str, *, square: bool = False) -> StepZero:
    """Promise another output, of square weights only on request, and say which."""
    return StepZero("other", note=note, square=square)


@dataclass(frozen=True)
class Method:
    """One entry of the catalogue.

    Attributes:
        name: lower case with hyphens, unique within its axis.
        axis: one of `AXES`.
        title: the paper's full title.
        year: of the paper.
        arxiv: its arXiv id, or "".
        code: the official repository, "owner/name", or "".
        formula: one line.
        status: "tested" or "experimental".
        start: the step-0 promise.
        build: the function.
        options: its keyword-only parameters and their defaults.
        traits: what else the axis needs to know.
        aliases: other names that find it.
    """

    name: str
    axis: str
    title: str
    year: int
    arxiv: str
    code: str
    formula: str
    status: str
    start: StepZero
    build: Callable[..., Any] = field(repr=False)
    options: Mapping[str, Any]
    traits: Mapping[str, Any] = field(default_factory=dict, repr=False)
    aliases: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        keys = ("name", "axis", "title", "year", "arxiv", "code", "formula", "status")
        return {
            **{k: getattr(self, k) for k in keys},
            "start": str(self.start),
            "options": dict(self.options),
        }

    @property
    def doc(self) -> str:
        """The documentation of the module that states the method."""
        return inspect.getdoc(inspect.getmodule(self.build)) or ""

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with defaults filled in.

        Raises:
            InvalidOption: an option is unknown or of another kind, or a number is not finite.
        """
        for key, value in options.items():
            if key not in self.options:
                known = ", ".join(self.options) or "none"
                hint = near_names(key, self.options) or f"; its options: {known}"
                raise InvalidOption(f"{self.name} has no option {key!r}{hint}")
            require_kind(self.name, self.build, key, value)
        return {**self.options, **options}


def require_kind(owner: str, build: Callable[..., Any], key: str, value: Any) -> None:
    """Refuse a value of another kind than `build` writes beside its parameter `key`.

    Args:
        owner: whose option it is, for the sentence.
        build: a function; where it says nothing of the parameter, every value is taken.
        key: name of the parameter.
        value: asked for.

    Raises:
        InvalidOption: it is of another kind, or not finite.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidOption(f"{owner}: {key} must be a finite number, not {value}")
    kinds = _annotated_kinds(build, key)
    if value is None and NoneType in kinds:
        return
    asked = [(phrase, fits(value)) for kind, phrase, fits in _KINDS if kind in kinds]
    if asked and not any(fits for _, fits in asked):
        phrases = " or ".join(dict.fromkeys(phrase for phrase, _ in asked))
        raise InvalidOption(f"{owner}: {key} must be {phrases}, not {value!r}")


def _annotated_kinds(build: Callable[..., Any], key: str) -> tuple[Any, ...]:
    try:
        hint = get_type_hints(build).get(key, Any)
    except NameError:  # a name that is imported for type checkers only
        return ()
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(get_origin(kind) or kind for kind in kinds)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# What an option's annotation asks of its value.
_KINDS: tuple[tuple[type, str, Callable[[Any], bool]], ...] = (
    (bool, "true or false", lambda value: isinstance(value, bool)),
    (float, "a number", _is_number),
    (int, "a whole number", lambda value: _is_number(value) and isinstance(value, int)),
    (str, "a text", lambda value: isinstance(value, str)),
    (Mapping, "a mapping", lambda value: isinstance(value, Mapping)),
    (tuple, "a list", lambda value: isinstance(value, list | tuple)),
    (Sequence, "a list", lambda value: isinstance(value, Sequence) and not isinstance(value, str)),
)


_METHODS: dict[tuple[str, str], Method] = {}


def _options(build: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(build).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name != "shared"
    }


def register(
    axis: str,
    name: str,
    *,
    title: str,
    year: int,
    arxiv: str = "",
    code: str = "",
    formula: str,
    status: str = "tested",
    start: StepZero = EXACT,
    traits: Mapping[str, Any] | None = None,
    aliases: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that enters a function in the catalogue.

    Raises:
        ValueError: the axis is unknown, or the name is taken on it.
    """

    def enter(build: Callable[..., Any]) -> Callable[..., Any]:
        known = _METHODS.get((axis, name))
        if not _NAME.fullmatch(name):
            raise ValueError(f"a method's name is lower case with hyphens, and {name!r} is not")
        if axis not in AXES or (known is not None and known.build.__module__ != build.__module__):
            raise ValueError(f"cannot register {axis} {name!r}: the axis is unknown or the name is taken")
        about = (title, year, arxiv, code, formula, status, start)
        _METHODS[axis, name] = Method(
            name, axis, *about, build, _options(build), traits or {}, tuple(aliases)
        )
        return build

    return enter


@cache
def load_all() -> None:
    """Import every module of methods in the package, then those that other packages announce."""
    for room in ("methods", "optim", "compression", "merging"):
        package = importlib.import_module(f"rankfold.{room}")
        for found in pkgutil.walk_packages(package.__path__, f"rankfold.{room}."):
            importlib.import_module(found.name)
    from importlib.metadata import entry_points

    for point in entry_points(group="rankfold.methods"):
        point.load()


def methods(axis: str | None = None) -> list[Method]:
    """Return the catalogue, by axis and name.

    Args:
        axis: one of `AXES`; None lists all.

    Raises:
        InvalidOption: there is no such axis.

    Example:
        >>> import rankfold as rf
        >>> rf.methods("structure")[0].name
        'abba'
    """
    load_all()
    if axis is not None and axis not in AXES:
        raise InvalidOption(f"there is no axis {axis!r}{near_names(axis, AXES)}")
    found = [m for m in _METHODS.values() if axis in (None, m.axis)]
    return sorted(found, key=lambda m: (AXES.index(m.axis), m.name))


def get(axis: str, name: str) -> Method:
    """Return a method by axis and name.

    Raises:
        UnknownMethod: there is none; the sentence lists near names.
    """
    load_all()
    name = _own_name(axis, name)
    if (axis, name) not in _METHODS:
        known = [n for a, n in _METHODS if a == axis]
        elsewhere = [a for a, n in _METHODS if n == name]
        hint = f"; {name!r} is of the axis {elsewhere[0]}" if elsewhere else near_names(name, known)
        listed = f"; known: {', '.join(sorted(known))}" if known else f"; there is no {axis} method yet"
        raise UnknownMethod(f"no {axis} is called {name!r}{hint or listed}")
    return _METHODS[axis, name]


def find_method(query: str) -> Method:
    """Return a method by name or arXiv id.

    Raises:
        UnknownMethod: there is none, or the name is on several axes and none is written (`axis=name`).

    Example:
        >>> import rankfold as rf
        >>> rf.find_method("2405.17604").name
        'lora-xs'
    """
    load_all()
    axis, _, name = query.rpartition("=")
    found = [
        m
        for m in methods()
        if (query and query == m.arxiv) or (name in (m.name, *m.aliases) and axis in ("", m.axis))
    ]
    if not found:
        raise UnknownMethod(f"no method is called {query!r}{near_names(query, {m.name for m in methods()})}")
    if len({m.axis for m in found}) > 1 and query != found[0].arxiv:
        axes = [m.axis for m in found]
        raise UnknownMethod(
            f"{query!r} is of the axes {' and '.join(axes)}: write "
            + " or ".join(f"{axis}={query}" for axis in axes)
        )
    return found[0]


def axes_of(name: str) -> list[str]:
    """Return the axes on which a name is registered."""
    load_all()
    return [axis for (axis, known), method in _METHODS.items() if name in (known, *method.aliases)]


def _own_name(axis: str, name: str) -> str:
    """Return the name under which a method is registered, given that or an alias."""
    found = (m.name for (a, _), m in _METHODS.items() if a == axis and name in m.aliases)
    return name if (axis, name) in _METHODS else next(found, name)
