"""AdaptEmb: frequent ids keep rows of their own, the others share what is left.

    E[x] = T[p] for p < f, else T[f + (p - f) mod (n - f)],   p = place of x by frequency

f is a tenth of the vocabulary. As Zhang et al. 2023 describe it in their comparison; Zhang et al. 2020
(frequency hashing) do the same with two hashes for the rare ids. At most half of the n rows that `keep`
leaves are own ones. With data, ids are counted and the place of every id is stored, four bytes each, within
`keep`; without, ids stand for their places, as where a tokenizer numbers by frequency. Of a given table the
frequent rows stay what they are, and every shared row is the mean of the rows that fall on it. Start, from
scratch: the same of the usual start.

Deviations: the hash is the remainder of the place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...methods.limits import in_range
from ...methods.registry import not_base, structure
from ...methods.site import Site
from ...weights import Dense, Weight
from ...weights.tables import Folded
from ..registry import compressor
from ..tables import Room, Shape, Sizes, Way, averaged, replace_tables, rows_in, table_from_scratch
from ..task import Task

ABOUT: dict[str, Any] = {
    "title": "Experimental Analysis of Large-scale Learnable Vector Storage Compression",
    "year": 2023,
    "arxiv": "2311.15578",
    "code": "HugoZHL/Hetu",
    "formula": "E[x] = T[p] for p < f, else T[f + (p - f) mod (n - f)]",
}


@dataclass(frozen=True)
class FrequentFirst(Way):
    """Own rows and shared ones."""

    frequent: float = 0.1

    reads_order: ClassVar[bool] = True

    def _own(self, rows: int, vocabulary: int) -> int:
        in_range("adaptemb", "[0, 1]", frequent=self.frequent)
        return min(int(self.frequent * vocabulary), rows // 2)

    def sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the shape of the table."""
        return {"table": ((rows_in(room, shape, 2), shape[1]), None)}

    def fit(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return the frequent rows and means of the others."""
        (rows, width), _ = self.sizes((table.shape[0], table.shape[1]), room)["table"]
        leaves = {"table": Dense(table.new_zeros(rows, width), "table", trainable=False)}
        if room.ordered:
            leaves["order"] = Dense(order, "order", trainable=False)
        slots = self.weight(leaves, (len(table), width)).slots(torch.arange(len(table), device=table.device))
        return {"table": averaged(table, slots, rows)}

    def weight(self, leaves: Mapping[str, Dense], shape: Shape) -> Folded:
        """Return T, read by place."""
        table = leaves["table"]
        return Folded(table, shape[0], self._own(table.shape[0], shape[0]), leaves.get("order"))


@structure(
    "adaptemb",
    **ABOUT,
    start=not_base("that of every table's rare rows averaged where they are shared"),
    rank=None,
    layers=("embedding",),
    targets="embeddings",
    scratch=True,
    example={"keep": 0.8},
)
def adaptemb(
    site: Site, *, keep: float = 0.25, bits: int = 32, ordered: bool = False, frequent: float = 0.1
) -> Weight:
    """Return T, read by place.

    Args:
        site: the table.
        keep: share of the table's bytes, in (0, 1].
        bits: of a number of the table.
        ordered: the ids' places are stored.
        frequent: share of the ids that have a row of their own, in [0, 1].
    """
    return table_from_scratch(site, FrequentFirst(frequent), keep, bits, ordered)


@compressor("adaptemb", **ABOUT, whole=True, layers=("embedding",), targets="embeddings")
def compress(task: Task, *, frequent: float = 0.1) -> None:
    """Replace tables by ones whose rare ids share rows.

    Args:
        task: the model, and data to count ids in, or none; `keep` is the share of every table's bytes.
        frequent: share of the ids that have a row of their own, in [0, 1].

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(40, 6))
        >>> before = model[0].weight.detach().clone()
        >>> after = rf.compress(model, "adaptemb", keep=0.25, progress=False)[0].expression.dense()
        >>> bool((after[:4] == before[:4]).all())
        True
    """
    replace_tables(task, "adaptemb", FrequentFirst(frequent))
