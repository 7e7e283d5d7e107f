"""TT-Rec: a table as a tensor train over the digits of its ids.

    E[(i_1 i_2 i_3), (j_1 j_2 j_3)] = G_1[i_1, j_1] G_2[i_2, j_2] G_3[i_3, j_3],   G_k[i, j] (r_{k-1}, r_k)

with r_0 = r_3 = 1, n_1 n_2 n_3 >= vocabulary, d_1 d_2 d_3 = d, after Yin et al. 2021. Digits are as even as
they can be; r_1 = r_2 is the largest that fits, or as large as it can be. Of a given table the cores are
found by one sweep of truncated decompositions (TT-SVD, Oseledets 2011), the rows that fill it up being zeros;
its error is at most sqrt(2) times that of the best cores of these ranks. Start, from scratch: the same of the
usual start.

Deviations: they train from scratch and draw the cores so that the table's numbers are near normal ones; their
kernels keep often used rows in a cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...linalg import truncated_svd
from ...methods.registry import not_base, structure
from ...methods.site import Site
from ...weights import Dense, Weight
from ...weights.tables import RowTrain
from ..registry import compressor
from ..tables import Room, Shape, Sizes, Way, no_room, replace_tables, table_from_scratch
from ..task import Task

ABOUT: dict[str, Any] = {
    "title": "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models",
    "year": 2021,
    "arxiv": "2101.11714",
    "code": "facebookresearch/FBTT-Embedding",
    "formula": "E[(i_1 i_2 i_3), (j_1 j_2 j_3)] = G_1[i_1, j_1] G_2[i_2, j_2] G_3[i_3, j_3]",
}
Digits = tuple[int, int, int]


def digits_of(vocabulary: int) -> Digits:
    """Return three numbers, nearly equal, whose product is the vocabulary or a little more.

    Example:
        >>> digits_of(30522)
        (32, 32, 30)
    """
    first = next(n for n in range(1, vocabulary + 1) if n**3 >= vocabulary)
    return first, first, -(-vocabulary // first**2)


def factors_of(width: int) -> Digits:
    """Return three numbers, as even as they can be, whose product is the width.

    Example:
        >>> factors_of(384)
        (6, 8, 8)
    """
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    found = [(a, b, width // (a * b)) for a in divisors for b in divisors if width % (a * b) == 0]
    return min((f for f in found if f[0] <= f[1] <= f[2]), key=sum)


def ranks_of(rows: Digits, columns: Digits, rank: int) -> tuple[int, int]:
    """Return r_1 and r_2 where a train has room for a rank, no larger than what the cores can span."""
    outer = [n * d for n, d in zip(rows, columns, strict=True)]
    first = min(rank, outer[0], outer[1] * outer[2])
    return first, min(rank, outer[2], first * outer[1])


def numbers_of(rows: Digits, columns: Digits, ranks: tuple[int, int]) -> int:
    """Return the numbers in the cores."""
    edges = (1, *ranks, 1)
    return sum(n * d * edges[k] * edges[k + 1] for k, (n, d) in enumerate(zip(rows, columns, strict=True)))


@dataclass(frozen=True)
class Train(Way):
    """Three cores."""

    def sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the shapes of the cores."""
        rows, columns, budget = digits_of(shape[0]), factors_of(shape[1]), room.numbers(shape)
        least, most = numbers_of(rows, columns, (1, 1)), max(shape)
        if least > budget:
            raise no_room(room, shape, least)
        low = 1
        while low < most:  # the largest rank that fits
            middle = (low + most + 1) // 2
            fits = numbers_of(rows, columns, ranks_of(rows, columns, middle)) <= budget
            low, most = (middle, most) if fits else (low, middle - 1)
        edges = (1, *ranks_of(rows, columns, low), 1)
        return {f"core{k + 1}": ((rows[k], edges[k], columns[k], edges[k + 1]), None) for k in range(3)}

    def fit(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return the cores by two truncated decompositions."""
        sizes = [size for size, _ in self.sizes((table.shape[0], table.shape[1]), room).values()]
        (n1, _, d1, r1), (n2, _, d2, r2), (n3, _, d3, _) = sizes
        whole = table.new_zeros(n1 * n2 * n3, table.shape[1])
        whole[: len(table)] = table
        grid = whole.view(n1, n2, n3, d1, d2, d3).permute(0, 3, 1, 4, 2, 5)
        left, values, right = truncated_svd(grid.reshape(n1 * d1, -1), r1)
        first = left.view(n1, 1, d1, r1)
        rest = (values[:, None] * right).reshape(r1 * n2 * d2, n3 * d3)
        left, values, right = truncated_svd(rest, r2)
        second = left.view(r1, n2, d2, r2).transpose(0, 1)
        third = (values[:, None] * right).view(r2, n3, d3, 1).transpose(0, 1)
        return {"core1": first, "core2": second.contiguous(), "core3": third.contiguous()}

    def weight(self, leaves: Mapping[str, Dense], shape: Shape) -> Weight:
        """Return the train."""
        return RowTrain([leaves["core1"], leaves["core2"], leaves["core3"]], shape[0])


@structure(
    "tt-rec",
    **ABOUT,
    start=not_base("that of a train near every table"),
    rank=None,
    layers=("embedding",),
    targets="embeddings",
    scratch=True,
    example={"keep": 0.8},
)
def tt_rec(site: Site, *, keep: float = 0.25, bits: int = 32) -> Weight:
    """Return the train.

    Args:
        site: the table.
        keep: share of the table's bytes, in (0, 1].
        bits: of a number of the table.
    """
    return table_from_scratch(site, Train(), keep, bits)


@compressor("tt-rec", **ABOUT, whole=True, layers=("embedding",), targets="embeddings")
def compress(task: Task) -> None:
    """Replace tables by tensor trains.

    Args:
        task: the model; `keep` is the share of every table's bytes.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(64, 8))
        >>> rf.compress(model, "tt-rec", keep=0.25, progress=False)[0].expression
        train(core1*[4x1x2x3], core2*[4x3x2x3], core3*[4x3x2x1], 64 rows)
    """
    replace_tables(task, "tt-rec", Train())
