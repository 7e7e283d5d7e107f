"""MDE, mixed dimension embeddings: groups of many, rare ids get fewer numbers an id.

    E_g = U_g V_g,   U_g (n_g, d_g),   V_g (d_g, d),   d_g = lambda n_g^-alpha,   lambda = d min_g(n_g)^alpha

Ginart et al. 2019, with d_g rounded to a power of two. A group is a field of their models; of one table it is
a run of ids by frequency, each run twice as long as the one before (they cut single tables by popularity,
too). alpha is the smallest, by bisection, for which everything fits. Groups in which a product would save
nothing stay as they are, the most frequent one always. With data, ids are counted and the place of every id
is stored, four bytes each, within `keep`; without, ids stand for their places, as where a tokenizer numbers
by frequency. Of a given table every product is the best one of its rank (Eckart and Young 1936). Start, from
scratch: the same of the usual start.

Deviations: they start at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, log2
from typing import Any, ClassVar

from torch import Tensor

from ...errors import InvalidOption
from ...linalg import truncated_svd
from ...methods.registry import not_base, structure
from ...methods.site import Site
from ...weights import Dense, Weight
from ...weights.tables import Mixed
from ..registry import compressor
from ..tables import Room, Shape, Sizes, Way, no_room, replace_tables, table_from_scratch
from ..task import Task

ABOUT: dict[str, Any] = {
    "title": "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems",
    "year": 2019,
    "arxiv": "1909.11810",
    "formula": "E_g = U_g V_g, d_g = lambda n_g^-alpha",
}
STEEPEST = 64.0  # alpha at which every group but the smallest has one dimension


def group_sizes(vocabulary: int, groups: int) -> list[int]:
    """Return the lengths of so many runs, each twice the one before, or of fewer in a small vocabulary.

    Example:
        >>> group_sizes(30, 4), group_sizes(5, 8)
        ([2, 4, 8, 16], [1, 4])
    """
    count = min(groups, floor(log2(vocabulary + 1)))
    first = vocabulary // (2**count - 1)
    sizes = [first * 2**g for g in range(count - 1)]
    return [*sizes, vocabulary - sum(sizes)]


def widths_of(sizes: list[int], width: int, alpha: float) -> list[int]:
    """Return d_g of every group: d where a product of that rank saves nothing.

    Example:
        >>> widths_of([16, 64, 256], 16, 0.5)
        [16, 8, 4]
    """
    found = [max(1.0, width * (min(sizes) / size) ** alpha) for size in sizes]
    powers = [2 ** round(log2(wanted)) for wanted in found]
    return [
        power if power * (size + width) < size * width else width
        for power, size in zip(powers, sizes, strict=True)
    ]


def numbers_of(sizes: list[int], widths: list[int], width: int) -> int:
    """Return the numbers of all groups."""
    return sum(n * d + (0 if d == width else d * width) for n, d in zip(sizes, widths, strict=True))


@dataclass(frozen=True)
class MixedDimensions(Way):
    """A product for every group."""

    groups: int = 8

    reads_order: ClassVar[bool] = True

    def widths(self, shape: Shape, room: Room) -> tuple[list[int], list[int]]:
        """Return the lengths of the groups and their dimensions."""
        if self.groups < 1:
            raise InvalidOption(f"mde: groups must be at least 1, not {self.groups}")
        sizes, budget = group_sizes(shape[0], self.groups), room.numbers(shape)

        def numbers(alpha: float) -> int:
            return numbers_of(sizes, widths_of(sizes, shape[1], alpha), shape[1])

        low, high = 0.0, STEEPEST
        if numbers(high) > budget:
            raise no_room(room, shape, numbers(high))
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if numbers(middle) <= budget else (middle, high)
        return sizes, widths_of(sizes, shape[1], high)

    def sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the shapes of all factors."""
        found: Sizes = {}
        for group, (size, rank) in enumerate(zip(*self.widths(shape, room), strict=True)):
            found[f"up{group}"] = (size, rank), None
            if rank < shape[1]:
                found[f"down{group}"] = (rank, shape[1]), None
        return found

    def fit(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return the best products."""
        sizes, ranks = self.widths((table.shape[0], table.shape[1]), room)
        by_place = order.argsort() if room.ordered else slice(None)
        found: dict[str, Tensor] = {}
        for group, (part, rank) in enumerate(zip(table[by_place].split(sizes), ranks, strict=True)):
            if rank == table.shape[1]:
                found[f"up{group}"] = part
                continue
            left, values, right = truncated_svd(part, rank)
            found |= {f"up{group}": left * values.sqrt(), f"down{group}": values.sqrt()[:, None] * right}
        return found

    def weight(self, leaves: Mapping[str, Dense], shape: Shape) -> Weight:
        """Return the groups, read by place."""
        count = sum(name.startswith("up") for name in leaves)
        pairs = [(leaves[f"up{g}"], leaves.get(f"down{g}")) for g in range(count)]
        return Mixed(pairs, leaves.get("order"))


@structure(
    "mde",
    **ABOUT,
    start=not_base("that of the best products of every table's groups"),
    rank=None,
    layers=("embedding",),
    targets="embeddings",
    scratch=True,
    example={"keep": 0.8, "groups": 2},
)
def mde(site: Site, *, keep: float = 0.25, bits: int = 32, ordered: bool = False, groups: int = 8) -> Weight:
    """Return the groups, read by place.

    Args:
        site: the table.
        keep: share of the table's bytes, in (0, 1].
        bits: of a number of the table.
        ordered: the ids' places are stored.
        groups: runs of ids, each twice as long as the one before.
    """
    return table_from_scratch(site, MixedDimensions(groups), keep, bits, ordered)


@compressor("mde", **ABOUT, whole=True, layers=("embedding",), targets="embeddings")
def compress(task: Task, *, groups: int = 8) -> None:
    """Replace tables by groups of products.

    Args:
        task: the model, and data to count ids in, or none; `keep` is the share of every table's bytes.
        groups: runs of ids, each twice as long as the one before.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(60, 8))
        >>> rf.compress(model, "mde", keep=0.5, groups=2, progress=False)[0].expression
        mixed(up0*[20x8], up1*[40x1], down1*[1x8], 60 rows)
    """
    replace_tables(task, "mde", MixedDimensions(groups))
