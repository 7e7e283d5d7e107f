"""The contract that every expression keeps, and the algebra that builds expressions from expressions."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .op import LINEAR, Op


@dataclass(frozen=True)
class Count:
    """Numbers held by an expression.

    Attributes:
        stored: numbers that have to be kept to rebuild it, the base included, seeded leaves not.
        trainable: numbers that an optimizer moves.
        bytes: bytes of the stored numbers.
    """

    stored: int
    trainable: int
    bytes: int


@dataclass(frozen=True)
class Pair:
    """A trained product `scale * up @ diag(gate) @ down` inside an expression.

    Attributes:
        up: leaf of shape (..., out, r).
        down: leaf of shape (..., r, in).
        scale: the constant before the product.
        gate: leaf of shape (..., r), or None while there is none.
        owner: the expression that can insert a gate.
        additive: the product is itself a term of the weight, so that its factors' gradients are those of the
            weight's, `g_up = scale G down^T` and `g_down = scale up^T G`, and it can be moved into the base.
    """

    up: Leaf
    down: Leaf
    scale: float
    gate: Leaf | None
    owner: Gateable
    additive: bool = True


class Gateable(Protocol):
    """An expression between whose two factors a gate can stand."""

    def insert_gate(self, gate: Leaf) -> None:
        """Put diag(gate) between the two factors; gate has shape (r,)."""

    def remove_gate(self) -> None:
        """Take the gate between the two factors away."""

    def resize(self, up: Tensor, down: Tensor, gate: Tensor | None = None) -> None:
        """Let the factors, and the gate between them, hold values of another rank."""


class Weight(nn.Module):
    """A linear map with matrix (out, in), stated as an expression over structured maps.

    For every expression `w(x)` equals `x @ w.dense().T` to rounding, forward and backward. Expressions are
    built with `+`, `@` and `*`, and `print(w)` shows the formula with shapes, trained leaves marked by `*`.

    Args:
        shape: (out, in) of the matrix.

    Example:
        >>> import torch, rankfold as rf
        >>> w = rf.weights.frozen(torch.eye(3)) + 2 * (
        ...     rf.weights.trained(torch.ones(3, 1), "up") @ rf.weights.trained(torch.ones(1, 3), "down")
        ... )
        >>> w
        frozen[3x3] + 2 (up*[3x1] @ down*[1x3])
        >>> bool((w(torch.ones(3)) == torch.ones(3) @ w.dense().T).all())
        True
    """

    atomic = True  # the formula needs no brackets inside another one
    by_token = False  # the map itself differs from token to token, so that it has no matrix

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    # What an expression is asked for ------------------------------------------------------------------

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        raise NotImplementedError

    def map(self, x: Tensor) -> Tensor:
        """Apply the matrix to the last axis of x: (..., in) to (..., out)."""
        return F.linear(x, self.dense().to(x.dtype))

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the matrix to an input.

        Args:
            x: (..., in), or (batch, channels, *space) where `op` is a convolution.
            bias: (out,) or None.
            op: how the matrix meets its input.
        """
        y = self.map(x) if op is LINEAR else op.apply(x, self.dense().to(x.dtype))
        return op.add(y, bias)

    def pull(self, x: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the leaves make, each with its own gradient, for a gradient of the output.

        Through them the leaves get theirs. Where less is enough for that, the output is not computed.

        Args:
            x: (n, in), a constant.
            grad: (n, out).
        """
        yield self(x), grad

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the matrix: ids (...) to (..., in)."""
        return self.dense()[ids]

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return `(up, down)`, (out, r) and (r, in), where the rank is small; else None."""
        return None

    def small_rank(self) -> int | None:
        """Return the rank of the small form, None where there is none to evaluate by; computes nothing."""
        return None

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the trained two-factor products inside, each with the constant before it."""
        yield from ()

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the trained leaves of two-sided maps, each with the side it stands on: output or input."""
        yield from ()

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the trained leaves that meet the input itself, each with its axis of input channels."""
        yield from ()

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds of applying the expression to so many tokens."""
        return tokens * self.shape[0] * self.shape[1]

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return 0

    def formula(self) -> str:
        """Return the expression as a formula with shapes."""
        return f"{type(self).__name__}[{'x'.join(map(str, self.shape))}]"

    @property
    def T(self) -> Weight:
        """The transposed map, (in, out), sharing every leaf with this one."""
        return Transposed(self)

    # What follows from it -----------------------------------------------------------------------------

    def leaves(self) -> Iterator[Leaf]:
        """Yield every leaf once, in the order of the formula."""
        seen: set[int] = set()
        for module in self.modules():
            if isinstance(module, Leaf) and id(module) not in seen:
                seen.add(id(module))
                yield module

    def sources(self) -> Iterator[Leaf]:
        """Yield every leaf that evaluation reads, those of an expression in a leaf's place included."""
        for leaf in self.leaves():
            below = leaf.below()
            if below is None:
                yield leaf
            else:
                yield from below.sources()

    def has_matrix(self) -> bool:
        """Say whether the map is the same for every token."""
        return not any(isinstance(part, Weight) and part.by_token for part in self.modules())

    def leaf(self, name: str) -> Leaf:
        """Return the leaf of that name.

        Raises:
            KeyError: there is none.
        """
        for leaf in self.leaves():
            if leaf.name == name:
                return leaf
        raise KeyError(
            f"no leaf {name!r} in {self.formula()}; it has {[leaf.name for leaf in self.leaves()]}"
        )

    def count(self) -> Count:
        """Count the numbers of the expression; a tensor shared by several leaves counts once."""
        tensors = {id(leaf.tensor()): leaf for leaf in self.leaves() if leaf.stored}
        values = [leaf.tensor() for leaf in tensors.values()]
        return Count(
            stored=sum(v.numel() for v in values),
            trainable=sum(v.numel() for v in values if v.requires_grad),
            bytes=sum(v.numel() * v.element_size() for v in values),
        )

    def __add__(self, other: Weight | float) -> Weight:
        if isinstance(other, Weight):
            from .sums import Sum

            return Sum(self, other)
        return self if other == 0 else NotImplemented

    __radd__ = __add__  # so that sum() of expressions works

    def __sub__(self, other: Weight) -> Weight:
        return self + -1.0 * other

    def __matmul__(self, other: Weight) -> Weight:
        from .products import Product

        return Product(self, other)

    def __mul__(self, other: Weight | float) -> Weight:
        from .composites import Scaled
        from .products import Hadamard

        return Hadamard(self, other) if isinstance(other, Weight) else Scaled(other, self)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return self.formula()

    def bracketed(self) -> str:
        """The formula, in brackets where it is a sum or a product."""
        return self.formula() if self.atomic else f"({self.formula()})"


class Transposed(Weight):
    """The transpose of an expression, by default through its matrix."""

    def __init__(self, inner: Weight) -> None:
        super().__init__((inner.shape[1], inner.shape[0]))
        self.inner = inner

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.inner.dense().T

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return the inner pair, transposed and exchanged."""
        pair = self.inner.factored()
        return None if pair is None else (pair[1].T, pair[0].T)

    def map(self, x: Tensor) -> Tensor:
        """Apply the transpose, through the small form where there is one."""
        pair = self.factored()
        return LINEAR.low_rank(x, *(t.to(x.dtype) for t in pair)) if pair else super().map(x)

    def small_rank(self) -> int | None:
        """Return the inner rank."""
        return self.inner.small_rank()

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return self.inner.dense_macs()

    @property
    def T(self) -> Weight:
        """The expression itself."""
        return self.inner

    def formula(self) -> str:
        """Return the expression as a formula with shapes."""
        return f"{self.inner.bracketed()}^T"


class Leaf(Weight):
    """A tensor of an expression, whatever its source; most are matrices, some have other dimensions.

    Args:
        name: the method's own name for it, unique within one expression; saved files use it.
        shape: shape of the tensor.
    """

    stored = True  # has to be kept in a file; a leaf drawn from a seed has not

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.name = name
        self.substitute: Tensor | None = None

    def source(self) -> Tensor:
        """Return the tensor from where it lives."""
        raise NotImplementedError

    def below(self) -> Weight | None:
        """Return the expression that stands in this leaf's place, if any."""
        return None

    def tensor(self) -> Tensor:
        """Return the tensor as it stands now."""
        return self.source() if self.substitute is None else self.substitute

    def dense(self) -> Tensor:
        """Return the tensor."""
        return self.tensor()

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the tensor."""
        return F.embedding(ids, self.tensor())

    @property
    def trainable(self) -> bool:
        """Whether an optimizer moves it, directly or through what it is made of."""
        return self.tensor().requires_grad

    def formula(self) -> str:
        """Return name and shape, marked where it is trained."""
        mark = "*" if self.trainable else ""
        return f"{self.name}{mark}[{'x'.join(map(str, self.shape))}]"


class substituted:
    """Within the block, leaves read the given tensors instead of their own."""

    def __init__(self, leaves: list[Leaf], tensors: list[Tensor]) -> None:
        self.leaves, self.tensors = leaves, tensors

    def __enter__(self) -> None:
        for leaf, tensor in zip(self.leaves, self.tensors, strict=True):
            leaf.substitute = tensor

    def __exit__(self, *_: object) -> None:
        for leaf in self.leaves:
            leaf.substitute = None


_clock = 0


def tick(*_: object) -> None:
    """Let everything that was derived be derived again, after a change that leaves no mark on a tensor."""
    global _clock
    _clock += 1


# Fused optimizers write into parameters without raising their version.
register_optimizer_step_post_hook(tick)


class Versions(NamedTuple):
    """What identifies the present values of tensors: the tensors themselves, their versions and memory."""

    tensors: list[Tensor]
    numbers: list[int]


def versions(tensors: list[Tensor]) -> Versions | None:
    """Return what identifies the tensors' present values, or None where that cannot be told."""
    numbers = [_clock]
    for tensor in tensors:
        if tensor.is_inference():
            return None
        numbers += (tensor._version, tensor.data_ptr())
    return Versions(tensors, numbers)


def same_versions(first: Versions | None, second: Versions | None) -> bool:
    """Say whether two results of `versions` name the same tensors, unchanged."""
    if first is None or second is None:
        return False
    return first.numbers == second.numbers and all(map(operator.is_, first.tensors, second.tensors))


def inference() -> bool:
    """Say whether derived tensors may be kept between calls: no gradients, not while compiling."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()
