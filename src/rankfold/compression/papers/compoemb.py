"""Compositional embeddings by quotient and remainder: two small tables give every id a row of its own.

    E[x] = R[x mod k] (.) Q[x div k],   R (k, d),   Q (ceil(vocabulary / k), d),   (.) entry by entry

Shi et al. 2019, with their product. k is the largest for which both tables fit, so the fewest ids share a row
of R. At least 2 sqrt(vocabulary) rows are needed. Of a given table both are fitted by least squares, each for
the other in turn, which for every column is the best product of rank one of its (Q, R) rectangle. Start, from
scratch: the same fit of the usual start.

Deviations: they train both from scratch and start them at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...methods.registry import not_base, structure
from ...methods.site import Site
from ...weights import Dense, Weight
from ...weights.tables import QuotientRemainder
from ..registry import compressor
from ..tables import Room, Shape, Sizes, Way, no_room, replace_tables, rows_in, table_from_scratch
from ..task import Task

ABOUT: dict[str, Any] = {
    "title": "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation "
    "Systems",
    "year": 2019,
    "arxiv": "1909.02107",
    "formula": "E[x] = R[x mod k] (.) Q[x div k]",
}
ROUNDS, STILL = 100, 1e-6  # of least squares at most, and the relative change at which they end


def remainders(rows: int, vocabulary: int) -> int | None:
    """Return the largest k with k + ceil(vocabulary / k) at most `rows`, or None.

    Example:
        >>> remainders(25, 100), remainders(20, 100), remainders(19, 100)
        (20, 10, None)
    """
    fits = (k for k in range(rows - 1, 0, -1) if k - (-vocabulary // k) <= rows)
    return next(fits, None)


@dataclass(frozen=True)
class Composed(Way):
    """A table of remainders and one of quotients."""

    def sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the shapes of both."""
        count = remainders(rows_in(room, shape, 2), shape[0])
        if count is None:
            least = next(rows for rows in range(2, 2 * shape[0] + 2) if remainders(rows, shape[0]))
            raise no_room(room, shape, least * shape[1])
        quotients = -(-shape[0] // count)
        return {"remainder": ((count, shape[1]), None), "quotient": ((quotients, shape[1]), None)}

    def fit(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return both, by alternating least squares."""
        sizes = self.sizes((table.shape[0], table.shape[1]), room)
        (count, width), quotients = sizes["remainder"][0], sizes["quotient"][0][0]
        grid = table.new_zeros(quotients * count, width)
        grid[: len(table)] = table
        mask = (torch.arange(len(grid), device=table.device) < len(table)).to(table)
        grid, mask = grid.view(quotients, count, width), mask.view(quotients, count, 1)
        gram = torch.einsum("qkd,pkd->dqp", grid, grid)
        quotient = torch.linalg.eigh(gram).eigenvectors[..., -1].T  # the solution, were no row missing
        for _ in range(ROUNDS):
            before = quotient
            remainder = _solved((grid * quotient[:, None]).sum(0), (mask * quotient.square()[:, None]).sum(0))
            quotient = _solved((grid * remainder).sum(1), (mask * remainder.square()).sum(1))
            if (quotient - before).norm() <= STILL * quotient.norm():
                break
        return {"remainder": remainder, "quotient": quotient}

    def weight(self, leaves: Mapping[str, Dense], shape: Shape) -> Weight:
        """Return the products of their rows."""
        return QuotientRemainder(leaves["remainder"], leaves["quotient"], shape[0])


def _solved(product: Tensor, square: Tensor) -> Tensor:
    return torch.where(square > 0, product / square.clamp_min(1e-30), 1.0)


@structure(
    "compoemb",
    **ABOUT,
    start=not_base("that of the best product of the two tables"),
    rank=None,
    layers=("embedding",),
    targets="embeddings",
    scratch=True,
    example={"keep": 0.8},
)
def compoemb(site: Site, *, keep: float = 0.25, bits: int = 32) -> Weight:
    """Return R[x mod k] (.) Q[x div k].

    Args:
        site: the table.
        keep: share of the table's bytes, in (0, 1].
        bits: of a number of the table.
    """
    return table_from_scratch(site, Composed(), keep, bits)


@compressor("compoemb", **ABOUT, whole=True, layers=("embedding",), targets="embeddings")
def compress(task: Task) -> None:
    """Replace tables by products of the rows of two.

    Args:
        task: the model; `keep` is the share of every table's bytes.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 6))
        >>> rf.compress(model, "compoemb", keep=0.25, progress=False)[0].expression
        quotient-remainder(remainder*[20x6], quotient*[5x6], 100 rows)
    """
    replace_tables(task, "compoemb", Composed())
