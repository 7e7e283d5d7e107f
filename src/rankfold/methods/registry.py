"""The catalogue: every method says what it is by registering itself, and nothing else has to be edited.

A structure, an initialiser or a rank rule is a function with a decorator. Its options are its keyword-only
parameters, its defaults theirs; title, year, arXiv id and formula go into the catalogue, the command line and
the documentation. Third parties register theirs through the entry point group `rankfold.methods`.
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

from ..errors import InvalidOption, UnknownMethod, near_names

AXES = (
    "structure", "init", "ranks", "dynamics", "optim", "pretrain", "compress", "merge", "continual",
    "federated", "edit", "analysis", "layers", "numerics", "recipe",
)  # fmt: skip
Shape = tuple[int, int]
Need = str | tuple[str, Mapping[str, Any]]
Needs = Sequence[Need] | Callable[[Mapping[str, Any], int], Sequence[Need]]
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\+?")


@dataclass(frozen=True)
class StepZero:
    """What a method promises of the model's output before the first step.

    Attributes:
        kind: "exact" (the base's output to the last bit), "near" (within the tolerance, relative to the
            largest output), or "other".
        tolerance: for "near".
        note: for "other": what the output is instead.
        square: for "other": of square weights only; other weights start at the base.
    """

    kind: str
    tolerance: float = 0.0
    note: str = ""
    square: bool = False

    def __str__(self) -> str:
        """Return the promise as a phrase."""
        if self.kind == "near":
            return f"the base's output within {self.tolerance:g}"
        return "exactly the base's output" if self.kind == "exact" else self.note


EXACT = StepZero("exact")


def near_base(tolerance: float) -> StepZero:
    """Promise the base's output within a tolerance relative to the largest output."""
    return StepZero("near", tolerance)


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
            self._check_value(key, value)
        return {**self.options, **options}

    def _check_value(self, key: str, value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidOption(f"{self.name}: {key} must be a finite number, not {value}")
        kinds = _annotated_kinds(self.build, key)
        if value is None and NoneType in kinds:
            return
        asked = [(phrase, fits(value)) for kind, phrase, fits in _KINDS if kind in kinds]
        if asked and not any(fits for _, fits in asked):
            raise InvalidOption(f"{self.name}: {key} must be {asked[0][0]}, not {value!r}")


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
        _METHODS[axis, name] = Method(name, axis, *about, build, _options(build), traits or {})
        return build

    return enter


def smaller_side(shape: Shape) -> int:
    """The limit of a rank whose basis or factors span the weight: min(out, in)."""
    return min(shape)


def structure(
    name: str,
    *,
    stage: str = "add",
    init: str | tuple[str, Mapping[str, Any]] | None = None,
    starts: Sequence[str] = (),
    rank: int | None = 8,
    limit: Callable[[Shape], int] | None = smaller_side,
    multiple: Callable[[Mapping[str, Any]], int] = lambda options: 1,
    layers: Sequence[str] = ("linear", "attention", "embedding", "convolution"),
    plan: Callable[..., Any] | None = None,
    gate: Callable[..., Any] | None = None,
    activations: bool = False,
    targets: str = "all-linear",
    example: Mapping[str, Any] | None = None,
    refuses: Sequence[str] = (),
    pairs: str = "",
    sides: bool = False,
    entries: bool = False,
    training: type | None = None,
    apart: Sequence[str] = (),
    chooses: bool = False,
    one_graph: bool = True,
    keeps: Callable[[str, Mapping[str, Any]], bool] = lambda path, options: True,
    needs: Needs = (),
    **about: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a structure: `build(site, rank, *, options) -> Weight` (or a Branch, for `activations`).

    Args:
        name: in the catalogue.
        stage: where the change stands: replace, transform, modulate, add, normalise, or activation.
        init: the paper's initialiser, by name or (name, options); None if there is nothing to initialise.
        starts: which starts of an initialiser make sense: zero, residual, displaced, frame.
        rank: default rank; None if the structure has none.
        limit: largest rank for a shape (out, in); None if there is no limit.
        multiple: given the options, the number that a rank must be a multiple of.
        layers: the layer kinds it applies to.
        plan: `plan(sites, ranks, *, seed, options) -> Planned`, what is decided for all weights together.
        gate: `gate(options) -> GateRule`, for a change that is open for some tokens only.
        activations: the change acts on a module's output.
        targets: the default targets.
        example: options without which it cannot be built, for tests and documentation.
        refuses: the weights of the battery that it refuses, such as "odd" where sides have to be even.
        pairs: what its trained two-factor products are: "terms" of the weight, whose gradients are those of
            the weight's and which can be moved into the base; "parts" of something else, which only take
            gates; or "" if it has none.
        sides: it has trained leaves on the output side and on the input side of a map.
        entries: it has a trained leaf that meets the input itself.
        training: a class derived from `Dynamics`, made with those of the structure's options that are its
            fields: what the structure's paper does around every step of the optimizer.
        apart: names of trained leaves that the loss gives no gradient: they learn from one of their own.
        chooses: it chooses among its parts by comparing numbers, so that its output jumps where rounding
            changes a choice.
        one_graph: it compiles to one graph; one that looks at its inputs from Python does not.
        keeps: `keeps(path, options)`, for `activations`: which of the modules that a preset finds it edits.
        needs: as for an initialiser; with `activations`, of the linear layers inside the edited modules.
        about: title, year, arxiv, code, formula, status, start: see `Method`.
    """
    traits = {
        "stage": stage, "init": init, "starts": tuple(starts), "rank": rank, "limit": limit,
        "multiple": multiple, "layers": tuple(layers), "plan": plan, "gate": gate, "activations": activations,
        "targets": targets, "example": dict(example or {}), "refuses": tuple(refuses),
        "pairs": pairs, "sides": sides, "entries": entries, "training": training,
        "apart": tuple(apart), "chooses": chooses, "one_graph": one_graph,
        "keeps": keeps, "needs": needs,
    }  # fmt: skip
    return register("structure", name, **about, traits=traits)


def init(
    name: str,
    *,
    gives: str | Sequence[str],
    needs: Needs = (),
    rate: bool = False,
    limit: Callable[[Shape], int] | None = None,
    structure: str = "lora",
    dynamics: str | None = None,
    example: Mapping[str, Any] | None = None,
    **about: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an initialiser: `start(site, rank, scaling, *, options) -> Factors | Basis`.

    Args:
        name: in the catalogue.
        gives: one or more of zero (the product is zero), residual (the start is subtracted from the base),
            displaced (it moves the base), frame (two outer factors of a weight), displaced frame (those and a
            core that moves the base), gated (a product behind a gate that is zero). A Basis serves as a frame
            and, split evenly, as residual factors.
        needs: the statistics that it reads, as `collect` takes them, or `needs(options, rank)` that returns
            them for the largest rank; a name may carry the data set that it is read from, "gradient@forget".
        rate: it depends on the learning rate.
        limit: largest rank that it can start for a shape (out, in); None leaves that to the structure.
        structure: the structure that is meant where a point names the initialiser alone.
        dynamics: the dynamics that it cannot do without.
        example: options without which it cannot be used, for tests and documentation.
        about: title, year, arxiv, code, formula, status, start: see `Method`.
    """
    given = (gives,) if isinstance(gives, str) else tuple(gives)
    traits = {
        "gives": given, "needs": needs, "rate": rate, "limit": limit, "structure": structure,
        "dynamics": dynamics, "example": dict(example or {}),
    }  # fmt: skip
    return register("init", name, **about, traits=traits)


def ranks(
    name: str,
    *,
    needs: Needs = (),
    scales: str = "reference",
    init: tuple[str, Mapping[str, Any]] | None = None,
    largest: Callable[[Mapping[str, Any], int], int] = lambda options, rank: rank,
    entries: Callable[[Mapping[str, Any]], bool] = lambda options: False,
    example: Mapping[str, Any] | None = None,
    **about: Any,
) -> Callable[..., Any]:
    """Register a rank rule: a function `share(units, rank, *, options) -> {path: rank}` or a `DynamicRanks`.

    Args:
        name: in the catalogue.
        needs: as for an initialiser, evaluated at the rank that was asked for.
        scales: which rank alpha is divided by: "reference", the one that was asked for, the same for every
            weight, or "own", the one that the weight was given.
        init: the start that the paper pairs with its gates, where the structure is started as its own paper
            says.
        largest: the most that it may give one weight, from its options and the rank that was asked for.
        entries: whether, with these options, it acts on the leaf that meets the input.
        example: options without which it cannot be used, for tests and documentation.
        about: title, year, arxiv, code, formula, status, start: see `Method`.
    """
    traits = {
        "needs": needs, "scales": scales, "init": init, "largest": largest, "entries": entries,
        "example": dict(example or {}),
    }  # fmt: skip

    def enter(build: Any) -> Any:
        dynamic = isinstance(build, type)
        return register("ranks", name, **about, traits={**traits, "dynamic": dynamic})(build)

    return enter


def dynamics(
    name: str,
    *,
    needs: Sequence[str] = (),
    pairs: str = "",
    sides: bool = False,
    moves_base: bool = False,
    owns_step: bool = False,
    gates: bool = True,
    excludes: Sequence[str] = (),
    init: tuple[str, Mapping[str, Any]] | None = None,
    function: str = "",
    example: Mapping[str, Any] | None = None,
    **about: Any,
) -> Callable[..., Any]:
    """Register a dynamics: a class derived from `Dynamics` whose keyword-only parameters are its options.

    Args:
        name: in the catalogue.
        needs: which of total_steps, scheduler, validation and loss `attach` has to be given.
        pairs: "terms" if it acts on two-factor products that are terms of the weight, "parts" if any will do,
            "" if it acts on none.
        sides: it tells the output side from the input side.
        moves_base: it moves changes into the stored weight.
        owns_step: it replaces the optimizer's step of the pairs, which it can for Adam and AdamW.
        gates: it also works where a rank rule has put a gate into the pairs.
        excludes: other dynamics that it cannot run beside.
        init: the start of its paper, for structures that are started as their own paper says.
        function: dotted name of the function that is called instead, for what is no part of a training.
        example: options without which it cannot be used, for tests and documentation.
        about: title, year, arxiv, code, formula, status, start: see `Method`.
    """
    traits = {
        "needs": tuple(needs), "pairs": pairs, "sides": sides, "moves_base": moves_base,
        "owns_step": owns_step, "gates": gates, "excludes": tuple(excludes), "init": init,
        "function": function, "example": dict(example or {}),
    }  # fmt: skip
    return register("dynamics", name, **about, traits=traits)


def recipe(name: str, **about: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a named point: a function without parameters that returns the `Recipe` that the name means.

    Args:
        name: in the catalogue; no part of another axis may have it, for a point is written by names.
        about: title, year, arxiv, code, formula, status, start: see `Method`.
    """
    return register("recipe", name, **about)


@cache
def load_all() -> None:
    """Import every module of methods in the package, then those that other packages announce."""
    package = importlib.import_module("rankfold.methods")
    for found in pkgutil.walk_packages(package.__path__, "rankfold.methods."):
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


def needs_of(method: Method | None, options: Mapping[str, Any], rank: int) -> list[Need]:
    """Return the statistics that a method reads for ranks up to this one."""
    needs = () if method is None else method.traits["needs"]
    return list(needs(options, rank) if callable(needs) else needs)


def get(axis: str, name: str) -> Method:
    """Return a method by axis and name.

    Raises:
        UnknownMethod: there is none; the sentence lists near names.
    """
    load_all()
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
        m for m in methods() if (query and query == m.arxiv) or (m.name == name and axis in ("", m.axis))
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
    return [axis for axis, known in _METHODS if known == name]
