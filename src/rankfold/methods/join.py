"""Joining the two adapters of Break-for-Make, of content and of style, into the one of its second stage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible
from ..layers import Adaptation, require
from ..weights import owned
from .capacity import Allotment
from .prepare import install, prepare
from .recipe import Recipe, resolve, split_part


def join(model: nn.Module, content: str, style: str, name: str = "joined") -> nn.Module:
    """Add the adapter of stage 2, which holds what two adapters of stage 1 have learnt, and make it active.

    Args:
        model: a model that holds both adapters; saved ones are loaded first, `load(model, folder, name)`.
        content: the adapter whose D is taken.
        style: the adapter whose A, B and C are taken.
        name: of the new adapter, in which both halves train.

    Returns:
        The model.

    Raises:
        NotAdapted: there is no such adapter.
        Incompatible: they are not of this structure, not alike, or drawn from other seeds; or one has not
            trained the half that is taken of it.
    """
    adaptation = require(model)
    first, second = (_halves(adaptation, each) for each in (content, style))
    records = [adaptation.adapter(each).record for each in (content, style)]
    frozen = [key for key in second if key.endswith(".frozen")]
    points = [_of_both(record) for record in records]
    alike = all(records[0][key] == records[1][key] for key in ("ranks", "references"))
    alike = alike and points[0] == points[1] is not None and not any(each["train"] for each in records)
    if not alike or not all(torch.equal(first[key], second[key]) for key in frozen):
        raise Incompatible(
            f"{content!r} and {style!r} cannot be joined: both have to be of break-for-make, with the same "
            "seed, options, ranks and targets, and without modules trained whole"
        )
    _refuse_frozen_half(content, records[0], "content", "D")
    _refuse_frozen_half(style, records[1], "style", "B")
    record, recipe = records[1], points[1]
    assert recipe is not None
    paths = re.compile("|".join(map(re.escape, record["targets"])))
    allotment = Allotment(record["ranks"], record["references"], record["rank"])
    prepared = prepare(
        model, resolve(recipe, {}), targets=paths, name=name, seed=record["seed"], heads=False, blank=True,
        allotment=allotment,
    )  # fmt: skip
    install(model, prepared)
    with torch.no_grad():
        for key, value in _halves(adaptation, name).items():
            value.copy_((first if key.endswith("down.half") else second)[key])
    return model


def _of_both(record: Mapping[str, Any]) -> Recipe | None:
    """Return the point with both halves trained, or None where it is of another structure."""
    name, options = split_part(Recipe.from_dict(record["recipe"]).structure)
    return Recipe((name, {**options, "part": "both"})) if name == "break-for-make" else None


def _refuse_frozen_half(name: str, record: Mapping[str, Any], wanted: str, half: str) -> None:
    """Refuse an adapter whose half that would be taken has stayed as it was drawn."""
    part = split_part(Recipe.from_dict(record["recipe"]).structure)[1]["part"]
    if part not in (wanted, "both"):
        trained = "B" if half == "D" else "D"
        raise Incompatible(
            f"{name!r} has trained {trained} alone, with part={part!r}, and {half} of {wanted} is taken from "
            f"it; call join(model, content, style) with an adapter of part={wanted!r} or 'both' there"
        )


def _halves(adaptation: Adaptation, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter by path and name."""
    return {
        f"{path}:{leaf}": getattr(module, attribute)
        for path, expression in adaptation.expressions(name).items()
        for leaf, (module, attribute) in owned(expression).items()
    }
