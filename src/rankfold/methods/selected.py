"""What sparse methods share: making a selection of entries, and choosing other ones while training runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..optim import resize as resize_state
from ..weights import Dense, Rectangle, Scattered, Selection, ThinRectangle
from .run import Run
from .site import Site

_SHORT = 2**31  # positions below it take four bytes


def scattered(site: Site, positions: Tensor, values: Tensor | None = None) -> Scattered:
    """Return a matrix whose trained entries stand at positions (n,) of the flattened weight.

    Args:
        site: the weight.
        positions: (n,) of the flattened weight, no one twice.
        values: (n,) to start from; None starts at zero.
    """
    start = site.zeros(len(positions)) if values is None else values
    packed = site.trained(start, "values")
    return Scattered(packed, [_index(site, positions, "index")], *_kept(site), site.shape)


def rectangle(site: Site, rows: Tensor, columns: Tensor, *, thin: bool = False) -> Rectangle:
    """Return a change of zero whose trained entries stand where rows (|X|,) and columns (|Y|,) cross.

    Args:
        site: the weight.
        rows: increasing.
        columns: increasing.
        thin: keep only the input channels of the columns for backward.
    """
    kind = ThinRectangle if thin else Rectangle
    support = [_index(site, rows, "rows"), _index(site, columns, "columns")]
    return kind(_values(site, len(rows), len(columns)), support, *_kept(site), site.shape)


def _values(site: Site, *shape: int) -> Dense:
    return site.trained(site.zeros(*shape), "values")


def _kept(site: Site) -> tuple[Dense, Dense]:
    nothing = torch.zeros(0, dtype=torch.long)
    return site.frozen(site.zeros(0), "kept"), _index(site, nothing, "kept.index")


def _index(site: Site, positions: Tensor, name: str) -> Dense:
    kind = torch.int32 if math.prod(site.shape) < _SHORT else torch.int64
    return Dense(positions.to(site.device, kind), name, trainable=False)


def selections(run: Run) -> dict[str, Selection]:
    """Return the selection in every expression of an adapter, by path."""
    found = {
        path: next((part for part in expression.modules() if isinstance(part, Selection)), None)
        for path, expression in run.expressions.items()
    }
    return {path: selection for path, selection in found.items() if selection is not None}


@torch.no_grad()
def selected_now(run: Run, path: str, selection: Selection) -> Tensor:
    """Return the entries of the weight as it is now where the trained ones stand, flat and in their order."""
    weight = run.expressions[path].dense().flatten()[selection.positions()]
    return weight.to(selection.values.value.dtype)


@torch.no_grad()
def reselect(run: Run, selection: Scattered, positions: Tensor) -> None:
    """Let the entries at other positions train; those that stay keep their moments, the others start at zero.

    The step count goes on, and the weight stays what it is.

    Args:
        run: the training.
        selection: of a weight.
        positions: (n,) of the flattened weight, no one twice.
    """
    before = selection.positions().long()
    wanted = torch.zeros(math.prod(selection.shape), dtype=torch.bool, device=before.device)
    wanted[positions] = True
    stays = wanted[before].nonzero().flatten()
    wanted[before] = False
    fresh = wanted.nonzero().flatten()
    resize_state(run.optimizer, selection.values.value, 0, stays, len(fresh))
    selection.select(torch.cat([before[stays], fresh]))
