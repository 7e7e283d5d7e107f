"""Squeezing trained products to smaller ranks through the QR decompositions of their factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption, InvalidRank
from ..layers import Adapter, require
from ..layers.riders import is_ridden
from ..linalg import squeeze_factors
from ..weights import Dense, Pair, Sum, Weight
from ..weights.weight import tick
from . import registry
from .recipe import Recipe, resolve


@torch.no_grad()
def squeeze(model: nn.Module, rank: int | None = None, *, name: str | None = None) -> nn.Module:
    """Cut the trained product of every adapted weight to a smaller rank, in place.

        change = s B diag(g) A (- s B0 A0 where the start is subtracted from the base),   s B' A' = [change]_r

    LoRA-Squeeze (Vulic et al. 2026): the best approximation of that rank, exact, never forming a matrix of
    the weight's size. Gates are multiplied in, and a start that is subtracted becomes part of it, so that
    what remains is a plain product beside the stored weight (within the normalised sum of dora); the scaling
    s stays what it was. The rank rule of the recipe, if any, ends. Create the optimizer of further training
    afterwards.

    Without a rank nothing is approximated: only terms that are zero, by their gate or a factor, are dropped,
    and a start that is subtracted stays. One term always remains, so that the adapter can train on.

    Args:
        model: an adapted model.
        rank: the most that a product keeps, at least 1; None drops zero terms only.
        name: of the adapter; None takes the only or the active one.

    Returns:
        The model; it is unchanged if an error is raised.

    Raises:
        NotAdapted: the model holds no such adapter.
        InvalidRank: the rank is no whole number of at least 1.
        Incompatible: the structure has no trained product that can be squeezed.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(16, 8)), "lora", rank=4, targets="0")
        >>> _ = torch.nn.init.normal_(model[0].expression.leaf("up").value)
        >>> rf.squeeze(model, rank=2)[0].expression
        W0[8x16] + (up*[8x2] @ down*[2x16])
    """
    _check(model, rank)
    adaptation = require(model)
    if any(is_ridden(each) for each in adaptation.adapters.values()):
        raise Incompatible("dynamics are attached to an optimizer; remove() their handle before squeezing")
    adapter, active = adaptation.adapter(name), adaptation.active
    if adapter.name not in active:
        adaptation.use([adapter.name])  # only what is active is known to train
    try:
        _squeeze(adapter, adaptation.expressions(adapter.name), rank)
    finally:
        if adapter.name not in active:
            adaptation.use(active)
    return model


def _check(model: Any, rank: Any) -> None:
    if isinstance(model, str | Path):
        raise InvalidOption("squeeze takes an adapted model: load the folder into its base first")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise InvalidRank(f"rank must be a whole number of at least 1, not {rank!r}")


def _squeeze(adapter: Adapter, expressions: dict[str, Weight], rank: int | None) -> None:
    pairs = _pairs(adapter, expressions, rank)
    factors = {path: _squeezed(pair, expression, rank) for path, (expression, pair) in pairs.items()}
    record = _recorded(adapter.record, {path: up.shape[1] for path, (up, _) in factors.items()}, rank)
    for path, (expression, pair) in pairs.items():
        _put(expression, pair, *factors[path], plain=rank is not None)
    adapter.record = record
    tick()


def _pairs(
    adapter: Adapter, expressions: dict[str, Weight], rank: int | None
) -> dict[str, tuple[Weight, Pair]]:
    """Return the one product of every expression."""
    structure = registry.structure_named(adapter.record["recipe"]["structure"][0])
    found = {path: (expression, list(expression.pairs())) for path, expression in expressions.items()}
    single = found and all(len(pairs) == 1 for _, pairs in found.values())
    if not single or adapter.branches:
        raise Incompatible(
            f"squeeze cuts the one product of two trained factors in a weight; {structure.name} has none or "
            "several"
        )
    if rank is not None and not all(pairs[0].additive for _, pairs in found.values()):
        raise Incompatible(
            f"the product in {structure.name} is not a term of the weight, so that cutting it is no best "
            "approximation; leave rank= away to drop terms that are zero"
        )
    return {path: (expression, pairs[0]) for path, (expression, pairs) in found.items()}


def _squeezed(pair: Pair, expression: Weight, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return the new factors, without a gate."""
    up, down = pair.up.tensor().detach(), pair.down.tensor().detach()
    if pair.gate is not None:
        down = pair.gate.tensor().detach()[:, None] * down
    start = _start(expression, pair)
    if rank is None or (start is None and rank >= up.shape[1]):
        return _nonzero(up, down, pair)
    if start is not None:
        up, down = torch.cat([up, -start[0]], 1), torch.cat([down, start[1]], 0)
    return _approximated(up, down, rank)


def _approximated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    most = min(rank, *up.shape, *down.shape)
    cut = squeeze_factors(up, down, most)
    noise = torch.finfo(cut.values.dtype).eps * max(*up.shape, *down.shape)
    alive = cut.values[:most] > noise * torch.linalg.matrix_norm(up) * torch.linalg.matrix_norm(down)
    if not alive.any():
        return torch.zeros_like(up[:, :1]), down[:1]
    return cut.up[:, alive].to(up), cut.down[alive].to(down)


def _nonzero(up: Tensor, down: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Drop the terms that are zero, or all but one of them, which can still train."""
    alive = (up.abs().sum(0) > 0) & (down.abs().sum(1) > 0)
    if alive.any():
        return up[:, alive], down[alive]
    return torch.zeros_like(up[:, :1]), pair.down.tensor().detach()[:1]


def _start(expression: Weight, pair: Pair) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the start that is subtracted, or None."""
    frozen = {leaf.name: leaf.tensor().detach() for leaf in expression.leaves() if not leaf.trainable}
    up, down = (frozen.get(f"{leaf.name}.start") for leaf in (pair.up, pair.down))
    return None if up is None or down is None else (up, down)


def _put(expression: Weight, pair: Pair, up: Tensor, down: Tensor, *, plain: bool) -> None:
    if pair.gate is not None:
        pair.owner.remove_gate()
    pair.owner.resize(up, down)
    if plain:
        _drop_start(expression)


def _drop_start(expression: Weight) -> None:
    """Take terms out of sums that are made of start leaves only."""
    for module in expression.modules():
        if isinstance(module, Sum):
            kept = [term for term in module.terms if not _is_start(term)]
            module.terms = nn.ModuleList(kept)  # type: ignore[assignment]  # a registered sequence


def _is_start(term: Weight) -> bool:
    leaves = list(term.leaves())
    return bool(leaves) and all(isinstance(leaf, Dense) and leaf.name.endswith(".start") for leaf in leaves)


def _recorded(record: Mapping[str, Any], ranks: Mapping[str, int], rank: int | None) -> dict[str, Any]:
    """Return a record that says what there is now."""
    recipe = Recipe.from_dict(record["recipe"])
    references = {**record["ranks"], **record.get("references", {})}
    init = _init_of(recipe, rank is not None)
    return {
        **record,
        "recipe": resolve(Recipe(recipe.structure, init, None, recipe.dynamics), {}).recipe.to_dict(),
        "ranks": {**record["ranks"], **ranks},
        "references": {path: references[path] for path in ranks},
        "squeezed": True,
    }


def _init_of(recipe: Recipe, plain: bool) -> Any:
    """Return the initialiser of the record; the structure's own where the start is no longer part of it."""
    part = resolve(recipe, {}).recipe.init
    if part is None:
        return None
    gives = registry.get("init", part[0]).traits["gives"]
    gone = plain if "residual" in gives else not {"zero", "displaced"} & set(gives)
    return None if gone else part
