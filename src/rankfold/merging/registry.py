"""The axis merge: what rules of merging say of themselves. The catalogue itself is `rankfold.catalogue`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..catalogue import register

Rule = Callable[..., Any]


def merger(
    name: str,
    *,
    base: str = "needed",
    linear: bool = False,
    whole: bool = False,
    most: int | None = None,
    example: Mapping[str, Any] | None = None,
    **about: Any,
) -> Callable[[Rule], Rule]:
    """Register a rule of merging.

    Most rules are functions of one tensor, `rule(parts, *, options) -> Tensor`; they stream over models of
    any size. One that needs several tensors at once is `rule(sources, *, options)`, which yields pairs (name,
    tensor) in the order of `sources.names`.

    Args:
        name: in the catalogue.
        base: whether the model from which all were trained is "needed", "optional" or "unused".
        linear: the result is a sum of the models with fixed weights, so that changes of low rank are merged
            by putting their factors side by side.
        whole: the rule takes all tensors together.
        most: the largest number of models.
        example: options without which it cannot be used, for tests and documentation.
        about: title, year, arxiv, code, formula, status: see `Method`.
    """
    traits = {"base": base, "linear": linear, "whole": whole, "most": most, "example": dict(example or {})}
    return register("merge", name, **about, traits=traits)
