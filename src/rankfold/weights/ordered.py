"""A product whose terms are ordered by importance, so that any first ones of them are a smaller weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .leaves import Dense
from .products import Product
from .weight import Leaf, Pair


class Ordered(Product):
    """`up @ down`, of which only the first terms take part while it is cut and trains.

    Args:
        up: leaf (out, r).
        down: leaf (r, in).

    Attributes:
        mask: (r,) ones and then zeros where it is cut, or None.
        whole: let all terms take part nevertheless.
    """

    mask: Tensor | None

    def __init__(self, up: Leaf, down: Leaf) -> None:
        super().__init__(up, down)
        self.register_buffer("mask", None, persistent=False)
        self.whole = False

    @property
    def width(self) -> int:
        """Number of terms."""
        return self.factors[0].shape[1]

    def cut(self, width: int | None) -> None:
        """Let the first `width` terms alone take part in training; None lets all."""
        up: Tensor = self.factors[0].dense()
        self.mask = (
            None
            if width is None
            else up.new_ones(self.width).index_fill_(0, torch.arange(width, self.width, device=up.device), 0)
        )
        self.forget()

    def take_whole(self, whole: bool) -> None:
        """Let all terms take part whether it is cut or not, or no longer."""
        self.whole = whole
        self.forget()

    @property
    def is_cut(self) -> bool:
        """Whether only the first terms take part now."""
        return self.training and self.mask is not None and not self.whole

    def factored(self) -> tuple[Tensor, Tensor]:
        """Return up and down; of what does not take part, up is zero."""
        up, down = (factor.dense() for factor in self.factors)
        if not self.is_cut:
            return up, down
        assert self.mask is not None
        return up * self.mask, down

    def dense(self) -> Tensor:
        """Return the matrix, (out, in), of all terms: a cut is for training, not for what is folded."""
        up, down = (factor.dense() for factor in self.factors)
        return up @ down

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield nothing: no other rule may change the terms or their order."""
        yield from ()

    def _denser(self, tokens: int) -> bool:
        # What is formed again in backward would be cut as it is then, not as it was in forward.
        return self.mask is None and super()._denser(tokens)

    def keep_first(self, width: int) -> None:
        """Let go of all terms but the first ones."""
        up, down = (factor.dense().detach() for factor in self.factors)
        self.cut(None)
        self.resize(up[:, :width].clone(), down[:width].clone())

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the width of tensors that are about to be copied in, by leaf name; else stay as it is."""
        leaves = [factor for factor in self.factors if isinstance(factor, Dense)]
        given = [tensors[leaf.name] for leaf in leaves if leaf.name in tensors]
        width = given[-1].shape[0] if given and given[-1].dim() == 2 else -1
        wanted = [(self.shape[0], width), (width, self.shape[1])]
        if [tuple(value.shape) for value in given] == wanted and width != self.width:
            self.resize(*(torch.empty_like(value) for value in given))

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "_buffers": {**self._buffers, "mask": None}, "whole": False}  # a copy is not cut
