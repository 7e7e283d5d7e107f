"""Putting weights that were found into the places of a model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import native
from ..layers import Adapter
from ..weights import Weight, owned
from .biases import given_biases
from .capacity import Allotment
from .prepare import install, prepare
from .recipe import Recipe, resolve


@torch.no_grad()
def replace(
    model: nn.Module,
    structure: tuple[str, Mapping[str, Any]],
    ranks: Mapping[str, int | None],
    leaves: Callable[[str], Mapping[str, Tensor]],
    *,
    rest_frozen: bool = False,
    seed: int = 0,
    record: Mapping[str, Any] | None = None,
    name: str = "default",
    biases: Sequence[str] = (),
    reference: int | None = None,
) -> Adapter:
    """Replace weights by expressions with given values; the stored weights are let go.

    Args:
        model: changed in place.
        structure: name and options of one that is trained from scratch, whose expression is put there.
        ranks: of every weight that is replaced, by path; None where the structure has no rank.
        leaves: `leaves(path)` returns the values by the names of the structure's leaves.
        rest_frozen: only the new weights train.
        seed: of the structure's random choices.
        record: what else a saved file says of it.
        name: of the adapter that holds them.
        biases: layers without a bias that get one of zeros.
        reference: the rank that alpha is divided by, where it is not each weight's own.

    Returns:
        The adapter.

    Raises:
        RankfoldError: a weight cannot be replaced; the model is then as it was.
        FormatError: names or shapes of leaves are others than the structure's.
    """
    resolved = resolve(Recipe(structure=(structure[0], dict(structure[1]))), {})
    with given_biases(model, biases):
        prepared = prepare(
            model, resolved, targets=list(ranks), name=name, seed=seed, heads=False, blank=True,
            allotment=Allotment(dict(ranks), {} if reference is None else dict.fromkeys(ranks, reference)),
            stored_precision=True, rest_frozen=rest_frozen, meta=True,
        )  # fmt: skip
        places = {path: prepared.layers[path].stored().device for path in prepared.expressions}
        for path, expression in prepared.expressions.items():
            native.check_expression(path, expression, leaves(path))
        prepared.adapter.record.update(record or {})
        prepared.adapter.record.update({"biases": list(biases)} if biases else {})
        install(model, prepared)
    for path, expression in prepared.expressions.items():  # now that the stored weights are gone
        _put(expression, leaves(path), places[path])
    return prepared.adapter


def _put(expression: Weight, leaves: Mapping[str, Tensor], device: torch.device) -> None:
    """Give the leaves of an expression, which have no memory yet, values of their own."""
    for leaf, (module, attribute) in owned(expression).items():
        blank = getattr(module, attribute)
        value = torch.empty_like(blank, device=device, requires_grad=False).copy_(leaves[leaf])
        trained = isinstance(blank, nn.Parameter)
        setattr(module, attribute, nn.Parameter(value, blank.requires_grad) if trained else value)
