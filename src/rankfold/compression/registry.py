"""The axis compress: what methods of compression say of themselves; the catalogue is `rankfold.catalogue`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..catalogue import Method, get, register
from ..errors import Incompatible

Build = Callable[..., Any]
Need = str | tuple[str, Mapping[str, Any]]
Needs = Sequence[Need] | Callable[[Mapping[str, Any]], Sequence[Need]]


def compressor(
    name: str,
    *,
    needs: Needs = (),
    share: str = "uniform",
    calibration: str = "parallel",
    whole: bool = False,
    solves: bool = False,
    structure: str | Callable[[Mapping[str, Any]], tuple[str, Mapping[str, Any]]] = "low-rank",
    layers: Sequence[str] = ("linear", "convolution"),
    targets: str = "all-linear",
    rest_frozen: bool = False,
    shrinks: bool = True,
    compensates: bool = False,
    example: Mapping[str, Any] | None = None,
    lookups: Needs = (),
    per_sample: Callable[[Mapping[str, Any]], bool] = lambda options: False,
    finish: Build | None = None,
    update: Callable[[Mapping[str, Any]], Build | None] = lambda options: None,
    **about: Any,
) -> Callable[[Build], Build]:
    """Register a method of compression.

    Most say which error of one weight is made smallest: `build(site, *, options) -> Objective`. With `solves`
    a method finds the tensors itself, `build(site, rank, *, options) -> Found`, and with `whole` it
    compresses a model as it likes, `build(task, *, options) -> None` (see `compression.task.Task`).

    Args:
        name: in the catalogue.
        needs: the statistics that it reads, as `collect` takes them, or a function of the options.
        share: how it shares the parameters out, where the caller does not say; see `compression.shares`.
        calibration: "parallel" (statistics of the model as it was) or "sequential" (of every weight behind
            those that are compressed already).
        whole: it is a function of the model.
        solves: it returns the tensors of the structure.
        structure: that takes the weight's place, its leaves are filled; or a function of the options that
            returns its name and options.
        layers: the layer kinds that it applies to.
        targets: the default targets.
        rest_frozen: what is not compressed is frozen afterwards.
        shrinks: it leaves a share of the numbers, which `keep` says.
        compensates: it reads the model before an earlier compression, `original`.
        example: options without which it cannot be used, for tests and documentation.
        lookups: like `needs`, of embeddings, which look rows up.
        per_sample: of the options: whether the statistics are of the examples of every batch one by one.
        finish: `finish(site, solved, *, options) -> Solved` changes what was solved.
        update: of the options: None, or a second stage `update(site, solved) -> Solved` of one weight after
            another, with the statistics behind all that are compressed before it.
        about: title, year, arxiv, code, formula, status: see `Method`.
    """
    traits = {
        "needs": needs, "share": share, "calibration": calibration, "whole": whole, "solves": solves,
        "structure": structure, "layers": tuple(layers), "targets": targets, "rest_frozen": rest_frozen,
        "shrinks": shrinks, "compensates": compensates, "example": dict(example or {}), "lookups": lookups,
        "per_sample": per_sample, "finish": finish, "update": update,
    }  # fmt: skip
    return register("compress", name, **about, traits=traits)


def compressor_named(name: str) -> Method:
    """Return a method of compression.

    Raises:
        UnknownMethod: there is none.
        Incompatible: the name is that of a function, which is called.
    """
    method = get("compress", name)
    if "solves" not in method.traits:
        own = f"{method.build.__module__}.{method.build.__qualname__}"
        raise Incompatible(f"{name} does not compress one model by itself; call {own}")
    return method


def needs_of(method: Method, options: Mapping[str, Any], *, lookups: bool = False) -> list[Need]:
    """Return the statistics that a method reads, of weights that are multiplied or of those looked up."""
    needs = method.traits["lookups" if lookups else "needs"]
    return list(needs(options) if callable(needs) else needs)
