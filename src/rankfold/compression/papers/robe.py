"""ROBE: all numbers of a table are read from one array, in blocks at random offsets and with random signs.

    E[x, j] = s(g) a[(h(g // Z) + g mod Z) mod m],   g = x d + j,   s = +-1,   m = floor(keep vocabulary d)

Desai et al. 2021. h(b) = (a1 b + a2) mod P is a universal hash, P prime; nothing but the array is stored. Z =
1 is what comparisons of tables take; larger blocks are read in fewer pieces, and with Z = d a row in one.
Every number reads one slot, so of a given table the mean of what reads a slot, signs undone, is the array of
the least squared error. Start, from scratch: the same of the usual start, whose numbers are then smaller by
about the root of keep.

Deviations: the array belongs to one table; theirs serves all tables of a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...methods.registry import not_base, structure
from ...methods.site import Site
from ...weights import Dense, Weight
from ...weights.tables import Slots
from ..registry import compressor
from ..tables import Room, Shape, Sizes, Way, averaged, no_room, replace_tables, table_from_scratch
from ..task import Task

ABOUT: dict[str, Any] = {
    "title": "Random Offset Block Embedding Array (ROBE) for CriteoTB Benchmark MLPerf DLRM Model: 1000x "
    "Compression and 3.1x Faster Inference",
    "year": 2021,
    "arxiv": "2108.02191",
    "formula": "E[x, j] = s(g) a[(h(g // Z) + g mod Z) mod m], g = x d + j",
}


@dataclass(frozen=True)
class OffsetBlocks(Way):
    """One array."""

    block: int = 1
    seed: int = 0

    def sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the length of the array."""
        if self.block < 1:
            raise InvalidOption(f"robe: block must be at least 1, not {self.block}")
        if room.numbers(shape) < self.block:
            raise no_room(room, shape, self.block)
        return {"array": ((room.numbers(shape),), None)}

    def fit(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return the means."""
        shape = (table.shape[0], table.shape[1])
        (size,), _ = self.sizes(shape, room)["array"]
        blank = Dense(table.new_zeros(size), "array", trainable=False)
        slots, signs = self.weight({"array": blank}, shape).read(
            torch.arange(len(table), device=table.device)
        )
        return {"array": averaged((table * signs).flatten(), slots.flatten(), size)}

    def weight(self, leaves: Mapping[str, Dense], shape: Shape) -> Slots:
        """Return what reads the array."""
        return Slots(leaves["array"], shape, self.block, self.seed)


@structure(
    "robe",
    **ABOUT,
    start=not_base("that of every table's numbers averaged where they are shared"),
    rank=None,
    layers=("embedding",),
    targets="embeddings",
    scratch=True,
    example={"keep": 0.8},
)
def robe(site: Site, *, keep: float = 0.25, bits: int = 32, block: int = 1) -> Weight:
    """Return what reads the array.

    Args:
        site: the table.
        keep: share of the table's bytes, in (0, 1].
        bits: of a number of the table.
        block: Z, numbers that lie together.
    """
    return table_from_scratch(site, OffsetBlocks(block, site.seed), keep, bits)


@compressor("robe", **ABOUT, whole=True, layers=("embedding",), targets="embeddings")
def compress(task: Task, *, block: int = 1) -> None:
    """Replace tables by arrays that are read through a hash.

    Args:
        task: the model; `keep` is the share of every table's bytes.
        block: Z, numbers that lie together.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(40, 6))
        >>> rf.compress(model, "robe", keep=0.25, progress=False)[0].expression
        slots(array*[60], 40x6)
    """
    replace_tables(task, "robe", OffsetBlocks(block, task.seed))
