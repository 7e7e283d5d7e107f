"""A matrix whose rows are all one vector, such as the mean of a table of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import Leaf, Weight


class Offset(Weight):
    """The matrix `1 m^T`: every one of its `out` rows is m.

    Args:
        row: leaf (1, in), m.
        out: number of rows.
    """

    def __init__(self, row: Leaf, out: int) -> None:
        super().__init__((out, row.shape[1]))
        self.row = row

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.row.tensor().expand(self.shape)

    def map(self, x: Tensor) -> Tensor:
        """Apply the matrix: every output is the same product m x."""
        product: Tensor = torch.nn.functional.linear(x, self.row.tensor().to(x.dtype))
        return product.expand(*x.shape[:-1], self.shape[0])

    def rows(self, ids: Tensor) -> Tensor:
        """Return m for every id."""
        return self.row.tensor().expand(*ids.shape, self.shape[1])

    def macs(self, tokens: int) -> int:
        """Return tokens * in."""
        return tokens * self.shape[1]

    def formula(self) -> str:
        """Return m and the number of rows."""
        return f"offset({self.row.formula()}, {self.shape[0]} rows)"
