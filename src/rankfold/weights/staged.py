"""Weights that change their form while training runs: another expression takes the place of the first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .leaves import Dense
from .op import LINEAR, Op
from .separable import Separable
from .weight import Leaf, Pair, Weight, tick


class Staged(Weight):
    """An expression in whose place training puts another one.

    Args:
        now: what is evaluated now.
    """

    now: Weight

    def __init__(self, now: Weight) -> None:
        super().__init__(now.shape)
        self.now = now

    def become(self, expression: Weight) -> None:
        """Put another expression in the place of the one that is there."""
        self.now = expression.train(self.training)
        tick()  # whatever this is a part of may hold something derived

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the form whose tensors, by leaf name, are about to be copied in."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.now.dense()

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply what is there now."""
        if isinstance(self.now, Dense):
            return op.apply(x, self.now.tensor().to(x.dtype), bias)
        y: Tensor = self.now(x, bias, op)
        return y

    map = forward

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of what is there now."""
        return self.now.rows(ids)

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return the pair of what is there now."""
        return self.now.factored()

    def small_rank(self) -> int | None:
        """Return the rank of what is there now."""
        return self.now.small_rank()

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the pairs of what is there now."""
        yield from self.now.pairs(scale)

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the leaves of what is there now."""
        yield from self.now.entries()

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds of what is there now."""
        return self.now.macs(tokens)

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming what is there now."""
        return self.now.dense_macs()

    def formula(self) -> str:
        """Return the formula of what is there now."""
        return self.now.formula()

    def bracketed(self) -> str:
        """Return the formula of what is there now, in brackets where it needs them."""
        return self.now.bracketed()


class Densifying(Staged):
    """Factors that training multiplies out, once, to a trained matrix `weight`.

    It has no sides: an optimizer's groups stay what they are when the matrix takes the factors' place.
    """

    def densify(self) -> None:
        """Put the matrix in the place of the factors."""
        self.become(Dense(self.now.dense(), "weight", trainable=True))

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Become a matrix where there is one in the file."""
        if "weight" in tensors and not isinstance(self.now, Dense):
            like = next(self.now.leaves()).tensor()
            self.become(Dense(like.new_zeros(self.shape), "weight", trainable=True))


class Factoring(Staged):
    """A trained matrix `weight` that training takes apart, at its end, into two trained factors.

    Args:
        now: the matrix (out, in).
        window: kernel size per spatial axis, where a convolution is taken apart into a vertical and a
            horizontal one; else empty.
    """

    def __init__(self, now: Weight, window: tuple[int, ...] = ()) -> None:
        super().__init__(now)
        self.window = window

    def seen(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out, in) as the one that is taken apart, (in h, out w) with a window (h, w)."""
        return matrix if not self.window else _turned(matrix, self.window)

    def unseen(self, matrix: Tensor) -> Tensor:
        """Return what `seen` was made from."""
        if not self.window:
            return matrix
        height, width = self.window
        kernel = matrix.reshape(-1, height, self.shape[0], width)
        return kernel.permute(2, 0, 1, 3).reshape(self.shape)

    def split(self, left: Tensor, right: Tensor) -> None:
        """Put two factors, `left @ right` of the matrix as it is `seen`, in its place."""
        if not self.window:
            self.become(_trained(left, "up") @ _trained(right, "down"))
            return
        horizontal = right.reshape(len(right), self.shape[0], -1).transpose(0, 1).flatten(1)
        self.become(Separable(_trained(left.T, "vertical"), _trained(horizontal, "horizontal"), self.window))

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Become two factors where there are factors in the file."""
        inner = tensors.get("vertical" if self.window else "down")
        if inner is not None and isinstance(self.now, Dense):
            like, rank = self.now.tensor().detach(), len(inner)
            rows, columns = self.seen(like).shape
            self.split(like.new_zeros(rows, rank), like.new_zeros(rank, columns))


def _turned(matrix: Tensor, window: tuple[int, ...]) -> Tensor:
    kernel = matrix.reshape(len(matrix), -1, *window)
    return kernel.permute(1, 2, 0, 3).reshape(kernel.shape[1] * window[0], -1)


def _trained(value: Tensor, name: str) -> Dense:
    return Dense(value, name, trainable=True)


class Guided(Staged):
    """A map beside a dense guide, `alpha W + (1 - alpha) S`, until the guide is let go.

    Args:
        now: S.
        guide: leaf W (out, in).
        share: leaf (2,): alpha, and 1, or 0 where a training step leaves the guide out and S counts in full.

    Attributes:
        skips: the next forward in training leaves the guide out.
    """

    guide: Dense | None
    share: Dense | None

    def __init__(self, now: Weight, guide: Dense, share: Dense) -> None:
        super().__init__(now)
        self.guide, self.share, self.skips = guide, share, False

    def steer(self, alpha: float, skips: bool = False) -> None:
        """Set the guide's share alpha, and whether the next forward in training leaves it out."""
        assert self.share is not None
        self.share.tensor().copy_(torch.tensor([alpha, 1.0 - skips]))
        self.skips = skips
        tick()

    def release(self) -> None:
        """Let the guide go: S alone stays."""
        self.guide = self.share = None
        self.skips = False
        tick()

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the guide go where the file has none, and leave it out of the next step where the file does."""
        share = tensors.get("guide.share")
        if share is None:
            self.release()
        elif share.shape == (2,):
            self.skips = bool(share[1] == 0)

    def mixed(self, guide: Tensor, inner: Tensor) -> Tensor:
        """Return `alpha guide + (1 - alpha) inner`."""
        assert self.share is not None
        alpha = self.share.tensor()[0].to(guide.dtype)
        return alpha * guide + (1 - alpha) * inner

    def dense(self) -> Tensor:
        """Return the matrix of both, (out, in)."""
        return self.now.dense() if self.guide is None else self.mixed(self.guide.tensor(), self.now.dense())

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply both, or S alone."""
        if self.guide is None or (self.skips and self.training):
            return super().forward(x, bias, op)
        guided = op.apply(x, self.guide.tensor().to(x.dtype))
        return op.add(self.mixed(guided, self.now(x, op=op)), bias)

    map = forward

    def pull(self, x: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the output."""
        yield self(x), grad

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of both."""
        rows = self.now.rows(ids)
        return rows if self.guide is None else self.mixed(self.guide.rows(ids), rows)

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return the pair of S, where it is alone."""
        return self.now.factored() if self.guide is None else None

    def small_rank(self) -> int | None:
        """Return the rank of S, where it is alone."""
        return self.now.small_rank() if self.guide is None else None

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the pairs of S, which are parts beside the guide."""
        for pair in self.now.pairs(scale):
            yield pair if self.guide is None else replace(pair, additive=False)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the leaves of S, and the guide as one on the output side where there are any."""
        inner = list(self.now.sides())
        yield from inner
        if self.guide is not None and inner:
            yield self.guide, "output"

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds of both."""
        return self.now.macs(tokens) + (0 if self.guide is None else tokens * math.prod(self.shape))

    def formula(self) -> str:
        """Return guided(S by W, alpha), or S."""
        inner = self.now.formula()
        if self.guide is None or self.share is None:
            return inner
        return f"guided({inner} by {self.guide.formula()}, {self.share.formula()})"

    def bracketed(self) -> str:
        """Return the formula, in brackets where it needs them."""
        return self.now.bracketed() if self.guide is None else self.formula()
