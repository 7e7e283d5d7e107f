"""A table of 8-bit or 16-bit integers, with a scale for every row.

    E[x] = s_x q_x / Q,   q_x = round(Q E[x] / s_x),   s_x = max_j |E[x, j]|,   Q = 2^(b-1) - 1

Zhang, Yang and Yuan 2018 train tables of low precision for the prediction of clicks. b = 16 where it fits
into `keep`, else 8. The error of a number is at most half a step, s_x / Q. Scales train, integers do not;
ALPT (Li et al. 2023) trains steps of rows, too, and the integers beside them. Start, from scratch: the usual
start, rounded.

Deviations: they train the integers by stochastic rounding, with one fixed step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...methods.registry import not_base, structure
from ...methods.site import Site
from ...weights import Dense, Weight
from ...weights.tables import Integers
from ..registry import compressor
from ..tables import Room, Shape, Sizes, Way, no_room, replace_tables, table_from_scratch
from ..task import Task

ABOUT: dict[str, Any] = {
    "title": "Training with Low-precision Embedding Tables",
    "year": 2018,
    "formula": "E[x] = s_x round(Q E[x] / s_x) / Q",
}
KINDS = {16: torch.int16, 8: torch.int8}


@dataclass(frozen=True)
class Rounded(Way):
    """Integers and scales."""

    def sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the shapes of both."""
        rows, width = shape
        takes = {bits: room.of_bits(rows * width, bits) + rows for bits in KINDS}
        fits = [bits for bits in KINDS if takes[bits] <= room.numbers(shape)]
        if not fits:
            raise no_room(room, shape, takes[8])
        return {"integers": ((rows, width), KINDS[fits[0]]), "scales": ((rows, 1), None)}

    def fit(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return the rounded rows and their scales."""
        kind = self.sizes((table.shape[0], table.shape[1]), room)["integers"][1]
        assert kind is not None
        scales = table.abs().amax(1, keepdim=True)
        integers = torch.where(scales > 0, table * (torch.iinfo(kind).max / scales), 0.0).round().to(kind)
        return {"integers": integers, "scales": scales}

    def weight(self, leaves: Mapping[str, Dense], shape: Shape) -> Weight:
        """Return s_x q_x / Q."""
        return Integers(leaves["integers"], leaves["scales"])


@structure(
    "integer-table",
    **ABOUT,
    start=not_base("that of every table rounded"),
    rank=None,
    layers=("embedding",),
    targets="embeddings",
    scratch=True,
    example={"keep": 0.5},
)
def integer_table(site: Site, *, keep: float = 0.3, bits: int = 32) -> Weight:
    """Return s_x q_x / Q.

    Args:
        site: the table.
        keep: share of the table's bytes, in (0, 1].
        bits: of a number of the table.
    """
    return table_from_scratch(site, Rounded(), keep, bits)


@compressor("integer-table", **ABOUT, whole=True, layers=("embedding",), targets="embeddings")
def compress(task: Task) -> None:
    """Replace tables by integers.

    Args:
        task: the model; `keep` is the share of every table's bytes.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(40, 16))
        >>> rf.compress(model, "integer-table", keep=0.4, progress=False)[0].expression
        integers(integers[40x16], scales*[40x1])
    """
    replace_tables(task, "integer-table", Rounded())
