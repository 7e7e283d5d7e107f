"""What a rectifier leaves of a changed diagonal: the words of cores that may not become negative."""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import Leaf, Weight


class Affine(Leaf):
    """A vector scaled and shifted entry by entry: `value = scale . vector + shift`, all of shape (n,)."""

    stored = False

    def __init__(self, scale: Leaf, vector: Leaf, shift: Leaf, name: str) -> None:
        super().__init__(name, vector.shape)
        self.scale, self.vector, self.shift = scale, vector, shift

    @property
    def trainable(self) -> bool:
        """Whether any of the three is trained."""
        return any(leaf.trainable for leaf in (self.scale, self.vector, self.shift))

    def source(self) -> Tensor:
        """Return the vector as it is now."""
        return self.scale.tensor() * self.vector.tensor() + self.shift.tensor()


class Rectified(Leaf):
    """The change that a rectifier lets pass: `max(v + change, 0) - v`, zero where the change is and v >= 0.

    Args:
        values: leaf v of shape (n,).
        change: of a vector, leaf (n,); or of diag(v), an expression (n, n).
        name: the method's own name for the result.
        everywhere: rectify every entry of a matrix; else those of its diagonal only.
    """

    stored = False

    def __init__(self, values: Leaf, change: Weight, name: str, *, everywhere: bool = True) -> None:
        super().__init__(name, change.shape)
        self.values, self.change, self.everywhere = values, change, everywhere

    @property
    def trainable(self) -> bool:
        """Whether the change is trained."""
        return any(leaf.trainable for leaf in self.change.leaves())

    def source(self) -> Tensor:
        """Return the change that is left, in the shape of the change."""
        values, change = self.values.tensor(), self.change.dense()
        if change.dim() == 1:
            return (values + change).relu() - values
        diagonal = torch.diag(values)
        changed = diagonal + change
        if self.everywhere:
            return changed.relu() - diagonal
        return changed - torch.diag(torch.diagonal(changed).clamp_max(0)) - diagonal

    def macs(self, tokens: int) -> int:
        """Return those of a matrix, and of forming the change."""
        return super().macs(tokens) + self.change.dense_macs()

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the change."""
        return self.change.dense_macs()
