"""A stored weight between two trained diagonals."""

from __future__ import annotations

import math

from torch import Tensor

from .leaves import Base, Foreign
from .op import LINEAR, Op
from .products import Product
from .structured import Diagonal
from .thin import pays, rescaled_linear
from .weight import Leaf, inference


class Rescaled(Product):
    """`diag(left) @ base @ diag(right)`, as one wide product where there are many tokens.

    Args:
        left: leaf (out,).
        base: the stored weight, (out, in).
        right: leaf (in,).
    """

    def __init__(self, left: Leaf, base: Base, right: Leaf) -> None:
        super().__init__(Diagonal(left), base, Diagonal(right))
        self.left, self.base, self.right = left, base, right

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the three factors, or the matrix that they make."""
        plain = op is LINEAR and self.base.inner is None and not isinstance(self.base, Foreign)
        forming, applying = 2 * math.prod(self.shape), op.tokens(x) * sum(self.shape)
        if inference() or not plain or not pays(x, forming, applying):
            return super().forward(x, bias, op)
        left, weight, right = (leaf.tensor().to(x.dtype) for leaf in (self.left, self.base, self.right))
        return rescaled_linear(x, weight, bias, left, right)

    map = forward
