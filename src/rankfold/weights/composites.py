"""Composites that keep what they derive, and those that only pass an expression on: scaled, dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .leaves import Base, Pooled
from .op import LINEAR, Op
from .weight import Leaf, Pair, Versions, Weight, inference, same_versions, versions

Factors = tuple[Tensor, Tensor]
Derived = TypeVar("Derived")


def cast_pair(pair: Factors, x: Tensor) -> Factors:
    """Return two factors in the dtype of an input."""
    return pair[0].to(x.dtype), pair[1].to(x.dtype)


class Composite(Weight, Generic[Derived]):
    """An expression that may keep what it derives from its leaves while no gradients are wanted.

    What is kept is dropped when a leaf changes its version or its memory, when a forward with gradients runs,
    and whenever the model is switched between training and evaluation.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self._kept: tuple[Versions | None, Derived] | None = None
        self._tensors: list[Leaf] | None = None

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, dropping what was kept."""
        self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Drop everything derived from the leaves; needed after the expression itself is changed."""
        self._kept = self._tensors = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None, "_tensors": None}

    def derived(self) -> Derived:
        """Compute what may be kept."""
        raise NotImplementedError

    def keep(self) -> Derived:
        """Return `derived()`, from the last call where nothing has changed since."""
        if not inference():
            if self._kept is not None and not torch.compiler.is_compiling():
                self._kept = None
            return self.derived()
        if self._kept is None or not same_versions(self._kept[0], self._read()):
            self._tensors = None  # the expression itself may be another one
            self._kept = (self._read(), self.derived())
        return self._kept[1]

    def _read(self) -> Versions | None:
        if self._tensors is None:
            self._tensors = [
                leaf for leaf in self.sources() if leaf.stored or isinstance(leaf, Base | Pooled)
            ]
        return versions([_identity(leaf) for leaf in self._tensors])


def _identity(leaf: Leaf) -> Tensor:
    """Return the stored tensor that a leaf is read from."""
    if isinstance(leaf, Base):
        return leaf.identity()
    return leaf.pool() if isinstance(leaf, Pooled) else leaf.tensor()


class Scaled(Weight):
    """A constant, or a trained scalar leaf, times an expression."""

    atomic = False

    def __init__(self, scale: float | Leaf, inner: Weight) -> None:
        super().__init__(inner.shape)
        self.scale, self.inner = scale, inner

    def factor(self) -> float | Tensor:
        """Return the number."""
        return self.scale.tensor() if isinstance(self.scale, Leaf) else self.scale

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.factor() * self.inner.dense()

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return the inner pair with the number on `up`."""
        pair = self.inner.factored()
        return None if pair is None else (pair[0] if self.scale == 1.0 else pair[0] * self.factor(), pair[1])

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply through the small form, else scale the output."""
        pair = None if self.small_rank() is None else self.factored()
        y = self.inner(x, op=op) * self.factor() if pair is None else op.low_rank(x, *cast_pair(pair, x))
        return op.add(y.to(x.dtype), bias)

    map = forward

    def pull(self, x: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the inner expression yields, its gradients times a constant; a trained one needs all."""
        if isinstance(self.scale, Leaf):
            yield from super().pull(x, grad)
        else:
            yield from ((made, self.scale * own) for made, own in self.inner.pull(x, grad))

    def rows(self, ids: Tensor) -> Tensor:
        """Return scaled rows."""
        return self.factor() * self.inner.rows(ids)

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the inner pairs with the constant multiplied in."""
        if not isinstance(self.scale, Leaf):
            yield from self.inner.pairs(scale * self.scale)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the inner leaves."""
        yield from self.inner.sides()

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the inner leaves."""
        yield from self.inner.entries()

    def small_rank(self) -> int | None:
        """Return the inner rank."""
        return self.inner.small_rank()

    def macs(self, tokens: int) -> int:
        """Return the inner count."""
        return self.inner.macs(tokens)

    def dense_macs(self) -> int:
        """Return the inner count."""
        return self.inner.dense_macs()

    @property
    def T(self) -> Weight:
        """The scaled transpose."""
        return Scaled(self.scale, self.inner.T)

    def formula(self) -> str:
        """Return the number before the expression."""
        if isinstance(self.scale, Leaf):
            return f"{self.scale.formula()} {self.inner.bracketed()}"
        if isinstance(self.inner, Scaled) and not isinstance(self.inner.scale, Leaf):
            return Scaled(self.scale * self.inner.scale, self.inner.inner).formula()
        numbers = {1.0: "", -1.0: "-"}
        return f"{numbers.get(self.scale, f'{self.scale:g} ')}{self.inner.bracketed()}"


class Dropped(Weight):
    """An expression whose own input passes through dropout while training; the rest of a sum sees all.

    Args:
        inner: the expression.
        probability: of dropping an entry, in [0, 1].
        together: drop the same channels for all tokens of a call.
    """

    def __init__(self, inner: Weight, probability: float, *, together: bool = False) -> None:
        super().__init__(inner.shape)
        self.inner, self.probability, self.together = inner, probability, together

    @property
    def active(self) -> bool:
        """Whether inputs are dropped now."""
        return self.training and self.probability > 0

    def dense(self) -> Tensor:
        """Return the matrix without dropout, (out, in)."""
        return self.inner.dense()

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return the inner pair, unless inputs are dropped now."""
        return None if self.active else self.inner.factored()

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Drop entries of the input, then apply."""
        y: Tensor = self.inner(self._thinned(x, op), bias, op)
        return y

    def _thinned(self, x: Tensor, op: Op) -> Tensor:
        if not self.together:
            return F.dropout(x, self.probability, self.training)
        channels = x.shape[-1] if op is LINEAR else x.shape[1]
        return op.scale(x, F.dropout(x.new_ones(channels), self.probability, self.training))

    map = forward

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows; an index has no entries to drop."""
        return self.inner.rows(ids)

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the inner pairs."""
        yield from self.inner.pairs(scale)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the inner leaves."""
        yield from self.inner.sides()

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the inner leaves."""
        yield from self.inner.entries()

    def small_rank(self) -> int | None:
        """Return the inner rank."""
        return self.inner.small_rank()

    def macs(self, tokens: int) -> int:
        """Return the inner count."""
        return self.inner.macs(tokens)

    def dense_macs(self) -> int:
        """Return the inner count."""
        return self.inner.dense_macs()

    @property
    def T(self) -> Weight:
        """The transposed expression, without dropout."""
        return self.inner.T

    def formula(self) -> str:
        """Return the expression with its dropout."""
        return (
            f"dropout({self.inner.formula()}, {self.probability:g})"
            if self.probability
            else self.inner.formula()
        )
