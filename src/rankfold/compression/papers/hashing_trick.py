"""The hashing trick: ids share the rows of a smaller table.

    E[x] = E'[x mod n],   E' (n, d),   n = floor(keep vocabulary)

Weinberger et al. 2009, for features of any kind; the baseline of every paper on tables of embeddings. Of a
given table every shared row is the mean of the rows that fall on it, which no other row is nearer to in sum
of squares. Ids that fall together cannot be told apart. Start, from scratch: the same means of the usual
start.

Deviations: the hash is the remainder, as it is usual for ids that are numbers already, and without signs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...methods.registry import not_base, structure
from ...methods.site import Site
from ...weights import Dense, Weight
from ...weights.tables import Folded
from ..registry import compressor
from ..tables import Room, Shape, Sizes, Way, averaged, replace_tables, rows_in, table_from_scratch
from ..task import Task

ABOUT: dict[str, Any] = {
    "title": "Feature Hashing for Large Scale Multitask Learning",
    "year": 2009,
    "arxiv": "0902.2206",
    "formula": "E[x] = E'[x mod n]",
}


@dataclass(frozen=True)
class Hashing(Way):
    """One shared table."""

    def sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the shape of the shared table."""
        return {"table": ((rows_in(room, shape, 1), shape[1]), None)}

    def fit(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return means."""
        rows = rows_in(room, (table.shape[0], table.shape[1]), 1)
        return {"table": averaged(table, torch.arange(len(table), device=table.device) % rows, rows)}

    def weight(self, leaves: Mapping[str, Dense], shape: Shape) -> Weight:
        """Return E'[x mod n]."""
        return Folded(leaves["table"], shape[0])


@structure(
    "hashing-trick",
    **ABOUT,
    start=not_base("that of every table's rows averaged where they are shared"),
    rank=None,
    layers=("embedding",),
    targets="embeddings",
    scratch=True,
    example={"keep": 0.8},
)
def hashing_trick(site: Site, *, keep: float = 0.25, bits: int = 32) -> Weight:
    """Return E'[x mod n].

    Args:
        site: the table.
        keep: share of the table's bytes, in (0, 1].
        bits: of a number of the table.
    """
    return table_from_scratch(site, Hashing(), keep, bits)


@compressor("hashing-trick", **ABOUT, whole=True, layers=("embedding",), targets="embeddings")
def compress(task: Task) -> None:
    """Replace tables by ones whose rows are shared.

    Args:
        task: the model; `keep` is the share of every table's bytes.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(40, 6))
        >>> rf.compress(model, "hashing-trick", keep=0.25, progress=False)[0].expression
        folded(table*[10x6], 40 rows)
    """
    replace_tables(task, "hashing-trick", Hashing())
