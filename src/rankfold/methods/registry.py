"""The axes of an adaptation: what structures, initialisers, rank rules and dynamics say of themselves.

The catalogue itself is `rankfold.catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..catalogue import (
    AXES,
    EXACT,
    Method,
    StepZero,
    axes_of,
    exact_base,
    find_method,
    get,
    load_all,
    methods,
    near_base,
    not_base,
    register,
)
from ..errors import Incompatible

__all__ = [
    "AXES",
    "EXACT",
    "Method",
    "StepZero",
    "axes_of",
    "dynamics",
    "exact_base",
    "find_method",
    "get",
    "init",
    "load_all",
    "methods",
    "near_base",
    "needs_of",
    "not_base",
    "ranks",
    "recipe",
    "register",
    "structure",
    "structure_named",
]

Shape = tuple[int, int]
Need = str | tuple[str, Mapping[str, Any]]
Needs = Sequence[Need] | Callable[[Mapping[str, Any], int], Sequence[Need]]


def smaller_side(shape: Shape) -> int:
    """The limit of a rank whose basis or factors span the weight: min(out, in)."""
    return min(shape)


_LAYERS = ("linear", "attention", "embedding", "convolution")


def structure(
    name: str,
    *,
    stage: str = "add",
    init: str | tuple[str, Mapping[str, Any]] | None = None,
    starts: Sequence[str] = (),
    rank: int | None = 8,
    limit: Callable[[Shape], int] | None = smaller_side,
    multiple: Callable[[Mapping[str, Any]], int] = lambda options: 1,
    layers: Sequence[str] | None = None,
    plan: Callable[..., Any] | None = None,
    gate: Callable[..., Any] | None = None,
    activations: bool = False,
    targets: str = "all-linear",
    example: Mapping[str, Any] | None = None,
    refuses: Sequence[str] = (),
    pairs: str = "",
    sides: bool = False,
    entries: bool = False,
    noisy: bool = False,
    training: type | None = None,
    apart: Sequence[str] = (),
    chooses: bool = False,
    one_graph: bool = True,
    keeps: Callable[[str, Mapping[str, Any]], bool] = lambda path, options: True,
    needs: Needs = (),
    inputs: Sequence[str] = (),
    permanent: str = "",
    scratch: bool = False,
    nonlinear: bool = False,
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
        layers: the layer kinds it applies to: linear, attention, embedding, convolution; None means all, and
            linear ones from scratch.
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
        noisy: it draws noise between the factors of its products while training.
        training: a class derived from `Dynamics`, made with those of the structure's options that are its
            fields: what the structure's paper does around every step of the optimizer.
        apart: names of trained leaves that the loss gives no gradient: they learn from one of their own.
        chooses: it chooses among its parts by comparing numbers, so that its output jumps where rounding
            changes a choice.
        one_graph: it compiles to one graph; one that looks at its inputs from Python does not.
        keeps: `keeps(path, options)`, for `activations`: which of the modules that a preset finds it edits.
        needs: as for an initialiser; with `activations`, of the linear layers inside the edited modules.
        inputs: what its gate reads that is no argument of a usual model, such as classes or regions, by the
            names that `gate_inputs` takes.
        permanent: dotted name of the function that makes its change permanent where it cannot be folded.
        scratch: its expression takes the place of the weight, which is let go, and is trained from scratch
            with everything else in the model; `site.matrix()` is the usual start that it may read. It is
            registered on the axis pretrain and written in a point where a structure is.
        nonlinear: it is no linear map of its input, so that it has no matrix and cannot be folded.
        about: title, year, arxiv, code, formula, status, start: see `Method`.
    """
    layers = (_LAYERS[:1] if scratch else _LAYERS) if layers is None else layers
    traits = {
        "stage": stage, "init": init, "starts": tuple(starts), "rank": rank, "limit": limit,
        "multiple": multiple, "layers": tuple(layers), "plan": plan, "gate": gate, "activations": activations,
        "targets": targets, "example": dict(example or {}), "refuses": tuple(refuses),
        "pairs": pairs, "sides": sides, "entries": entries, "noisy": noisy,
        "training": training,
        "apart": tuple(apart), "chooses": chooses, "one_graph": one_graph,
        "keeps": keeps, "needs": needs, "inputs": tuple(inputs), "permanent": permanent, "scratch": scratch,
        "nonlinear": nonlinear,
    }  # fmt: skip
    return register("pretrain" if scratch else "structure", name, **about, traits=traits)


def structure_named(name: str) -> Method:
    """Return a structure, of a change or of a weight trained from scratch.

    Raises:
        UnknownMethod: there is none.
        Incompatible: the name is that of a function, which is called and is no part of a point.
    """
    method = get("pretrain" if "pretrain" in axes_of(name) else "structure", name)
    if "scratch" not in method.traits:
        own = f"{method.build.__module__}.{method.build.__qualname__}"
        raise Incompatible(f"{name} is no part of a point; call {own}")
    return method


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
    noise: bool = True,
    excludes: Sequence[str] = (),
    init: tuple[str, Mapping[str, Any]] | None = None,
    function: str = "",
    wraps: bool = False,
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
        noise: it also works where the structure draws noise between the factors.
        excludes: other dynamics that it cannot run beside.
        init: the start of its paper, for structures that are started as their own paper says.
        function: dotted name of the function that is called instead, for what is no part of a training.
        wraps: it puts a weight that is trained from scratch into an expression of its own
            (`Dynamics.wrapped`), where products of two factors are no terms of the weight.
        example: options without which it cannot be used, for tests and documentation.
        about: title, year, arxiv, code, formula, status, start: see `Method`.
    """
    traits = {
        "needs": tuple(needs), "pairs": pairs, "sides": sides, "moves_base": moves_base,
        "owns_step": owns_step, "gates": gates, "noise": noise, "excludes": tuple(excludes), "init": init,
        "function": function, "wraps": wraps, "example": dict(example or {}),
    }  # fmt: skip
    return register("dynamics", name, **about, traits=traits)


def recipe(name: str, **about: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a named point: a function without parameters that returns the `Recipe` that the name means.

    Args:
        name: in the catalogue; no part of another axis may have it, for a point is written by names.
        about: title, year, arxiv, code, formula, status, start: see `Method`.
    """
    return register("recipe", name, **about)


def needs_of(method: Method | None, options: Mapping[str, Any], rank: int) -> list[Need]:
    """Return the statistics that a method reads for ranks up to this one."""
    needs = () if method is None else method.traits["needs"]
    return list(needs(options, rank) if callable(needs) else needs)
