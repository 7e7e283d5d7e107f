"""Composites: sums, products and row-wise normalisation of expressions, each choosing how it is evaluated."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gates import Gated
from .kernels import (
    at_least_float32,
    forms,
    grid_linear,
    low_rank_linear,
    modulated_linear,
    normalized_linear,
    safe_ratio,
    scaled_low_rank,
    scaled_matrix,
)
from .leaves import Base, Dense, Foreign, Pooled
from .materialise import materialised_linear
from .op import LINEAR, Op, autocast_dtype
from .structured import Diagonal, Grid, Reflections
from .weight import Leaf, Pair, Versions, Weight, inference, same_versions, tick, versions

Factors = tuple[Tensor, Tensor]
Derived = TypeVar("Derived")


def _cast(pair: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    return pair[0].to(x.dtype), pair[1].to(x.dtype)


@dataclass
class Split:
    """A sum taken apart for evaluation.

    Attributes:
        base: a matrix (out, in), or None.
        foreign: a base that only its own module can apply, or None.
        trained: the low-rank terms that train, concatenated to one pair, or None.
        frozen: those that do not, likewise.
        others: every other term.
        grid: up (k, out / k, k q) and down (k, k q, in / k), where grids are all that stands beside the base.
    """

    base: Tensor | None = None
    foreign: Foreign | None = None
    trained: tuple[Tensor, Tensor] | None = None
    frozen: tuple[Tensor, Tensor] | None = None
    others: list[Weight] = field(default_factory=list)
    grid: tuple[Tensor, Tensor] | None = None

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Return all low-rank terms as one pair."""
        return _join([p for p in (self.trained, self.frozen) if p is not None])


def _join(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    return torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs], 0)


def _join_grids(terms: list[Weight]) -> tuple[Tensor, Tensor] | None:
    """Return grids of one block count as the factors of one grid, or None if there is any other term."""
    parts = [(t.factor(), t.inner) if isinstance(t, Scaled) else (1.0, t) for t in terms]
    grids = [(scale, grid) for scale, grid in parts if isinstance(grid, Grid)]
    if len(grids) < len(parts) or len({grid.grid for _, grid in grids}) != 1:
        return None
    ups, downs = (
        [scale * grid.up.tensor() for scale, grid in grids],
        [grid.down.tensor() for _, grid in grids],
    )
    if len(grids) == 1:
        return ups[0], downs[0]
    blocks = (grids[0][1].grid, -1)
    up = torch.cat([each.unflatten(2, blocks) for each in ups], 3).flatten(2)
    return up, torch.cat([each.unflatten(1, blocks) for each in downs], 2).flatten(1, 2)


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


class Sum(Composite[Split]):
    """The sum of expressions of one shape; nested sums are flattened, low-rank terms become one pair."""

    atomic = False
    terms: Sequence[Weight]

    def __init__(self, *terms: Weight) -> None:
        flat: list[Weight] = [t for term in terms for t in (term.terms if isinstance(term, Sum) else [term])]
        if len({t.shape for t in flat}) > 1:
            raise ValueError(f"cannot add {' and '.join(t.formula() for t in flat)}: the shapes differ")
        super().__init__(flat[0].shape)
        self.terms = nn.ModuleList(flat)  # type: ignore[assignment]  # a registered sequence

    def parts(self) -> Iterator[Weight]:
        """Yield the terms, those of a sum that stands in the base's place included."""
        for term in self.terms:
            inner = term.inner if isinstance(term, Base) else None
            if isinstance(inner, Sum):
                yield from inner.parts()
            else:
                yield term

    def derived(self) -> Split:
        """Take the sum apart."""
        split = Split()
        trained: list[Factors] = []
        frozen: list[Factors] = []
        for term in self.parts():
            if split.base is None and split.foreign is None and (leaf := _plain(term)) is not None:
                if isinstance(leaf, Foreign):
                    split.foreign = leaf
                else:
                    split.base = leaf.tensor()
            elif not self._small(term) or (pair := term.factored()) is None:
                split.others.append(term)
            else:
                (trained if pair[0].requires_grad or pair[1].requires_grad else frozen).append(pair)
        split.trained, split.frozen = _join(trained), _join(frozen)
        if split.trained is None:
            split.trained, split.frozen = split.frozen, None
        if split.base is not None and split.trained is None:
            split.grid = _join_grids(split.others)
        return split

    def _small(self, term: Weight) -> bool:
        """Whether a term's pair has fewer numbers than its matrix."""
        rank = term.small_rank()
        return rank is not None and rank * sum(self.shape) <= math.prod(self.shape)

    def small_rank(self) -> int | None:
        """Return the sum of the terms' ranks, where all have a small form."""
        ranks = [rank for term in self.parts() if (rank := term.small_rank()) is not None]
        return sum(ranks) if len(ranks) == len(list(self.parts())) else None

    def split(self) -> Split:
        """Take the sum apart for evaluation; the one place where its order is chosen."""
        return self.keep()

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        parts = list(self.parts())
        total = parts[0].dense()
        for part in parts[1:]:
            dense = part.dense()
            total = total + dense if dense.dtype == total.dtype else total.to(_wider(total, dense)) + dense
        return total

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply base and low-rank terms in one fused product, then the other terms."""
        split = self.split()
        if op is LINEAR and split.base is not None and split.grid is not None:
            return grid_linear(x, split.base, bias, *split.grid)
        if op is LINEAR and self._denser(split, x):
            return materialised_linear(self, x, bias)
        y = self._main(split, x, bias, op)
        for term in split.others:
            y = y + term(x, op=op)
        return y

    map = forward

    def _denser(self, split: Split, x: Tensor) -> bool:
        """Whether forming the whole matrix costs fewer multiply-adds than applying every term."""
        if split.base is None or not split.others or x.dtype not in (torch.float32, torch.float64):
            return False
        if any(not term_is_dense(term) for term in split.others):
            return False
        tokens, size = LINEAR.tokens(x), math.prod(self.shape)
        forming = sum(term.dense_macs() for term in split.others) + size
        applying = sum(min(term.macs(tokens), term.dense_macs() + tokens * size) for term in split.others)
        if torch.is_grad_enabled():
            return 3 * forming + tokens * size < 3 * applying
        return forming < applying

    def _main(self, split: Split, x: Tensor, bias: Tensor | None, op: Op) -> Tensor:
        if split.base is None:
            return self._without_base(split, x, bias, op)
        if split.trained is None:
            return op.apply(x, split.base.to(x.dtype), bias)
        return _added(x, split.base, bias, op, split.trained, split.frozen)

    def _without_base(self, split: Split, x: Tensor, bias: Tensor | None, op: Op) -> Tensor:
        pair = split.pair()
        low = None if pair is None else op.low_rank(x, *_cast(pair, x))
        if split.foreign is None:
            return op.add(x.new_zeros(()) if low is None else low, bias)
        y: Tensor = split.foreign(x, bias, op)
        return y if low is None else y + low.to(y.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the sum of the terms' rows."""
        return functools.reduce(torch.add, [term.rows(ids) for term in self.parts()])

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return all terms as one pair, where every one has a small form."""
        pairs = [pair for term in self.parts() if (pair := term.factored()) is not None]
        return _join(pairs) if len(pairs) == len(list(self.parts())) else None

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the pairs of every term."""
        for term in self.terms:
            yield from term.pairs(scale)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the two-sided leaves of every term."""
        for term in self.terms:
            yield from term.sides()

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the leaves of every term that meet the input."""
        for term in self.terms:
            yield from term.entries()

    def macs(self, tokens: int) -> int:
        """Return the sum over the terms."""
        return sum(term.macs(tokens) for term in self.parts())

    def dense_macs(self) -> int:
        """Return the sum over the terms."""
        return sum(term.dense_macs() for term in self.parts())

    @property
    def T(self) -> Weight:
        """The sum of the transposes."""
        return Sum(*(term.T for term in self.parts()))

    def formula(self) -> str:
        """Return the terms joined by +."""
        return " + ".join(term.formula() for term in self.terms).replace("+ -", "- ")


def _added(
    x: Tensor,
    base: Tensor,
    bias: Tensor | None,
    op: Op,
    trained: tuple[Tensor, Tensor],
    frozen: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Apply a matrix plus one or two low-rank pairs, fused where the layer is linear."""
    if op is LINEAR and not inference():
        return low_rank_linear(x, base, bias, *trained, *(frozen or ()))
    pair = trained if frozen is None else _join([trained, frozen])
    if op is LINEAR:
        return scaled_low_rank(x, base, bias, *pair)  # type: ignore[misc]
    return op.apply(x, base.to(x.dtype), bias) + op.low_rank(x, *_cast(pair, x))  # type: ignore[arg-type]


def _plain(term: Weight) -> Leaf | None:
    """Return a term that is a stored matrix, or None."""
    if isinstance(term, Base):
        return term if term.inner is None else None
    return term if isinstance(term, Dense) and len(term.shape) == 2 else None


def _wider(first: Tensor, second: Tensor) -> torch.dtype:
    return torch.promote_types(first.dtype, second.dtype)


def term_is_dense(term: Weight) -> bool:
    """Say whether an expression has a matrix that does not depend on the token."""
    return not any(isinstance(m, Gated) or (isinstance(m, Dropped) and m.active) for m in term.modules())


class Product(Composite[tuple[Factors | None, Split | None]]):
    """The matrix product of expressions, applied right to left, or through one small pair.

    Factors are flattened. Between two trained leaves a diagonal gate may be inserted (`insert_gate`).
    """

    atomic = False
    factors: Sequence[Weight]

    def __init__(self, *factors: Weight) -> None:
        flat: list[Weight] = [
            f for factor in factors for f in (factor.factors if isinstance(factor, Product) else [factor])
        ]
        for left, right in itertools.pairwise(flat):
            if left.shape[1] != right.shape[0]:
                raise ValueError(
                    f"cannot multiply {left.formula()} by {right.formula()}: the shapes do not meet"
                )
        super().__init__((flat[0].shape[0], flat[-1].shape[1]))
        self._set(flat)

    def _set(self, factors: list[Weight]) -> None:
        self.factors = nn.ModuleList(factors)  # type: ignore[assignment]  # a registered sequence

    def rank(self) -> int:
        """The smallest inner dimension."""
        return min(factor.shape[1] for factor in list(self.factors)[:-1])

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return functools.reduce(_multiplied, [factor.dense() for factor in self.factors])

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return (up, down), split where the inner dimension is smallest and the fewest sides are trained.

        A frozen side needs no gradient: of diag(b) B diag(d) A with B and A frozen, `down` is A itself.
        """
        if self.small_rank() is None:
            return None
        factors = list(self.factors)
        cuts = [(f.shape[0], _trained_sides(factors, i), i) for i, f in enumerate(factors) if i]
        cut = min(cuts)[2]
        return _chain(factors[:cut], from_left=False), _chain(factors[cut:], from_left=True)

    def small_rank(self) -> int | None:
        """Return the smallest inner dimension, unless a wide factor makes the small form a bad idea."""
        factors = list(self.factors)
        rank = self.rank()
        if rank >= min(self.shape) and not all(isinstance(f, Leaf | Diagonal) for f in factors):
            return None
        return None if any(isinstance(f, Base) for f in factors) else rank

    def reflected(self) -> Split | None:
        """Return `W + up @ down` for a stored weight times reflections, W (I - V T V^T) = W - (W V T) V^T."""
        base, *rest = self.factors
        if not isinstance(base, Base) or isinstance(base, Foreign) or base.inner is not None:
            return None
        if len(rest) != 1 or not isinstance(rest[0], Reflections):
            return None
        weight, (vectors, core) = base.tensor(), (t.to(base.tensor().dtype) for t in rest[0].compact())
        return Split(base=weight, trained=(weight @ vectors @ -core, vectors.T))

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply through the small pair where there is one, else factor by factor or as one matrix."""
        pair, split = self.keep()
        if split is not None and split.base is not None and split.trained is not None:
            return _added(x, split.base, bias, op, split.trained)
        if self._denser(op.tokens(x)) or (pair is None and op.groups > 1):
            return op.apply(x, self.dense().to(x.dtype), bias)
        if pair is not None:
            return op.add(op.low_rank(x, *_cast(pair, x)), bias)
        y: Tensor = self.factors[-1](x, op=op)
        for factor in reversed(list(self.factors)[:-1]):
            y = op.channels(y, factor)
        return op.add(y, bias)

    map = forward

    def derived(self) -> tuple[tuple[Tensor, Tensor] | None, Split | None]:
        """Return the small pair, or the sum that reflections amount to."""
        pair = self.factored()
        return pair, None if pair is not None else self.reflected()

    def _denser(self, tokens: int) -> bool:
        training = 3 if torch.is_grad_enabled() else 1
        return training * self.dense_macs() + tokens * math.prod(self.shape) < self.macs(tokens)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the left factor, taken through the others."""
        y = self.factors[0].rows(ids)
        for factor in list(self.factors)[1:]:
            y = factor.T.map(y)
        return y

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the pair of a product `up @ down` or `up @ diag(gate) @ down` of trained leaves."""
        ends = [self.factors[0], self.factors[-1]]
        middle = list(self.factors)[1:-1]
        if len(middle) > 1 or not all(isinstance(end, Dense) and end.trainable for end in ends):
            return
        gate = middle[0] if middle else None
        if gate is None:
            yield Pair(ends[0], ends[1], scale, None, self)  # type: ignore[arg-type]
        elif isinstance(gate, Diagonal):
            yield Pair(ends[0], ends[1], scale, gate.vector, self)  # type: ignore[arg-type]

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the trained leaves of the first and the last factor that have any, unless they are one."""
        factors = [
            [leaf for leaf in f.leaves() if leaf.trainable]
            for f in self.factors
            if not (isinstance(f, Diagonal) and f.vector.name.startswith("gate"))
        ]
        trained = [leaves for leaves in factors if leaves]
        if len(trained) > 1:
            yield from ((leaf, "output") for leaf in trained[0])
            yield from ((leaf, "input") for leaf in trained[-1])

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the leaves of the factor that meets the input."""
        yield from self.factors[-1].entries()

    def insert_gate(self, gate: Leaf) -> None:
        """Put diag(gate) between the two factors; gate has shape (r,)."""
        self._set([self.factors[0], Diagonal(gate), self.factors[1]])
        tick()  # whatever this product is part of holds the old pair

    def remove_gate(self) -> None:
        """Take the gate between the two factors away."""
        self._set([self.factors[0], self.factors[-1]])
        tick()

    def resize(self, up: Tensor, down: Tensor, gate: Tensor | None = None) -> None:
        """Let the two trained factors, and the gate between them, hold values of another rank."""
        ends = (self.factors[0], self.factors[-1])
        assert all(isinstance(end, Dense) for end in ends)
        for end, value in zip(ends, (up, down), strict=True):
            end.resize(value)  # type: ignore[operator]
        if gate is not None:
            middle = self.factors[1]
            middle.vector.resize(gate)  # type: ignore[operator]
            middle.shape = (gate.shape[0], gate.shape[0])
        tick()

    def macs(self, tokens: int) -> int:
        """Return the sum over the factors."""
        return sum(factor.macs(tokens) for factor in self.factors)

    def dense_macs(self) -> int:
        """Return the multiply-adds of multiplying the factors out, left to right."""
        rows, total = self.shape[0], 0
        for factor in list(self.factors)[1:]:
            total += factor.macs(rows)
        return total

    @property
    def T(self) -> Weight:
        """The transposed factors in the opposite order."""
        return Product(*(factor.T for factor in reversed(list(self.factors))))

    def formula(self) -> str:
        """Return the factors joined by @."""
        return " @ ".join(factor.bracketed() for factor in self.factors)


def _trained_sides(factors: list[Weight], cut: int) -> int:
    sides = (factors[:cut], factors[cut:])
    return sum(any(leaf.trainable for factor in side for leaf in factor.leaves()) for side in sides)


def _chain(factors: list[Weight], *, from_left: bool) -> Tensor:
    """Multiply factors out, starting at the thin end; a diagonal stays a vector."""
    values = [f.vector.tensor() if isinstance(f, Diagonal) else f.dense() for f in factors]
    if [v.dim() for v in values] == [1, 2, 1] and not values[1].requires_grad:
        return scaled_matrix(values[1], values[0], values[2])
    if from_left:
        result = functools.reduce(_multiplied, values)
    else:
        result = functools.reduce(lambda right, left: _multiplied(left, right), reversed(values))
    return torch.diag(result) if result.dim() == 1 else result


def _multiplied(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices in the wider of their dtypes; a vector stands for a diagonal matrix."""
    if left.dim() == 1 and right.dim() == 2:
        return left[:, None] * right
    if right.dim() == 1:
        return left * right
    dtype = _wider(left, right)
    return left.to(dtype) @ right.to(dtype)


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
        pair = self.factored()
        y = self.inner(x, op=op) * self.factor() if pair is None else op.low_rank(x, *_cast(pair, x))
        return op.add(y.to(x.dtype), bias)

    map = forward

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


class Hadamard(Composite[Factors | None]):
    """The entrywise product of two expressions; of two small ones by the Khatri-Rao product of their factors.

    (B1 A1) . (B2 A2) = (B1 * B2) (A1 * A2),  rank r1 r2, never formed as a matrix unless that is cheaper.
    """

    atomic = False

    def __init__(self, left: Weight, right: Weight) -> None:
        if left.shape != right.shape:
            raise ValueError(
                f"cannot multiply {left.formula()} by {right.formula()} entrywise: the shapes differ"
            )
        super().__init__(left.shape)
        self.left, self.right = left, right

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.left.dense() * self.right.dense()

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return the Khatri-Rao pair."""
        first, second = self.left.factored(), self.right.factored()
        if first is None or second is None:
            return None
        up = (first[0][:, :, None] * second[0][:, None, :]).flatten(1)
        return up, (first[1][:, None, :] * second[1][None, :, :]).flatten(0, 1)

    def derived(self) -> tuple[Tensor, Tensor] | None:
        """Return the small pair."""
        return self.factored()

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the pairs of both sides; neither is a term of the weight."""
        for pair in itertools.chain(self.left.pairs(scale), self.right.pairs(scale)):
            yield replace(pair, additive=False)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the two-sided leaves of both factors."""
        yield from self.left.sides()
        yield from self.right.sides()

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the leaves of both factors that meet the input."""
        yield from self.left.entries()
        yield from self.right.entries()

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply through the Khatri-Rao pair, or as a matrix where that costs less."""
        if self._denser(op.tokens(x)):
            return op.apply(x, self.dense().to(x.dtype), bias)
        return op.add(op.low_rank(x, *_cast(self.keep(), x)), bias)  # type: ignore[arg-type]

    map = forward

    def small_rank(self) -> int | None:
        """Return r1 r2, where both sides have a small form."""
        left, right = self.left.small_rank(), self.right.small_rank()
        return None if left is None or right is None else left * right

    def _denser(self, tokens: int) -> bool:
        rank = self.small_rank()
        dense = self.dense_macs() + tokens * math.prod(self.shape)
        return rank is None or dense < tokens * rank * sum(self.shape)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the product of the rows."""
        return self.left.rows(ids) * self.right.rows(ids)

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds at the cheaper of the two orders."""
        dense, rank = self.dense_macs() + tokens * math.prod(self.shape), self.small_rank()
        return dense if rank is None else min(dense, tokens * rank * sum(self.shape))

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming both matrices and their product."""
        return self.left.dense_macs() + self.right.dense_macs() + math.prod(self.shape)

    @property
    def T(self) -> Weight:
        """The entrywise product of the transposes."""
        return Hadamard(self.left.T, self.right.T)

    def formula(self) -> str:
        """Return the factors joined by a dot."""
        return f"{self.left.bracketed()} . {self.right.bracketed()}"


class Modulated(Weight):
    """`base . (1 + change)`: every entry of the base scaled by one plus the change."""

    atomic = False

    def __init__(self, base: Weight, change: Weight) -> None:
        super().__init__(base.shape)
        self.base, self.change = base, change

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the pairs of the change, which are no terms of the weight."""
        for pair in self.change.pairs(scale):
            yield replace(pair, additive=False)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the two-sided leaves of the change."""
        yield from self.change.sides()

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the leaves of the change that meet the input."""
        yield from self.change.entries()

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        base, change = self.base.dense(), self.change.dense()
        return (
            torch.addcmul(base, base, change.to(base.dtype))
            if base.dtype == change.dtype
            else base * (1 + change)
        )

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Form the modulated matrix, again in backward rather than keeping it."""
        pair = self.change.factored()
        if op is not LINEAR or pair is None or isinstance(self.base, Foreign):
            return self._dense_forward(x, bias, op)
        return modulated_linear(x, self.base.dense(), bias, *pair)

    map = forward

    def _dense_forward(self, x: Tensor, bias: Tensor | None, op: Op) -> Tensor:
        change = (self.base.dense() * self.change.dense()).to(x.dtype)
        return self.base(x, bias, op) + op.apply(x, change)  # type: ignore[no-any-return]

    def rows(self, ids: Tensor) -> Tensor:
        """Return modulated rows."""
        base = self.base.rows(ids)
        return base + base * self.change.rows(ids)

    def macs(self, tokens: int) -> int:
        """Return one product with the modulated matrix, and forming it."""
        return tokens * math.prod(self.shape) + self.dense_macs()

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return self.change.dense_macs() + math.prod(self.shape)

    @property
    def T(self) -> Weight:
        """The modulated transpose."""
        return Modulated(self.base.T, self.change.T)

    def formula(self) -> str:
        """Return base . (1 + change)."""
        return f"{self.base.bracketed()} . (1 + {self.change.formula()})"


class Normalized(Composite[tuple[Split, Tensor]]):
    """`diag(m / n) V`: every row of the direction V brought to a trained length m.

    The norm n is expanded over the factors of V = W + B A, so that the product is never formed:
    `n^2 = ||W||^2 + 2 <W, B A> + ||B A||^2`, row by row. It is a constant for autograd unless
    `detach=False`. A row of V that is exactly zero stays zero.

    Args:
        direction: expression (out, in).
        magnitude: leaf (out,).
        detach: whether the norm is left out of the gradient.
    """

    def __init__(self, direction: Weight, magnitude: Leaf, *, detach: bool = True) -> None:
        super().__init__(direction.shape)
        self.direction, self.magnitude, self.detach = direction, magnitude, detach

    def _split(self) -> Split:
        direction = self.direction
        if isinstance(direction, Sum):
            return direction.derived()
        return Split(others=[direction])

    def norm(self) -> Tensor:
        """Return the row norms of the direction, (out,), in float32 or better."""
        split = self._split()
        if split.base is None or split.others:
            dense = self.direction.dense()
            norms: Tensor = torch.linalg.vector_norm(dense, dim=1, dtype=at_least_float32(dense))
            return norms
        return row_norms(split.base, split.pair())

    def length(self) -> Tensor:
        """Return the row norms as the gradient is to see them: constants, unless `detach=False`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            return self.norm()

    def ratio(self) -> Tensor:
        """Return m / n, (out,); zero where the direction's row is zero."""
        return safe_ratio(self.magnitude.tensor(), self.length())

    def derived(self) -> tuple[Split, Tensor]:
        """Return the direction taken apart, and m / n."""
        return self._split(), self.ratio()

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.ratio()[:, None] * self.direction.dense()

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the direction and scale every output channel."""
        if inference():
            split, ratio = self.keep()
            pair = split.pair()
            if op is LINEAR and split.base is not None and pair is not None and not split.others:
                return scaled_low_rank(x, split.base, bias, pair[0], pair[1], ratio)
            return op.add(op.scale(self._unbiased(x, op), ratio.to(x.dtype)), bias)
        split = self._split()
        if op is not LINEAR or split.base is None or split.trained is None or split.others:
            return op.add(op.scale(self._unbiased(x, op), self.ratio().to(x.dtype)), bias)
        own = self.detach and forms(x, split.base.shape, autocast_dtype(x))
        norm = None if own else self.length()
        magnitude = self.magnitude.tensor()
        return normalized_linear(x, split.base, bias, split.trained, split.frozen, magnitude, norm)

    map = forward

    def _unbiased(self, x: Tensor, op: Op) -> Tensor:
        y: Tensor = self.direction(x, op=op)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the direction at their lengths."""
        return self.ratio()[ids][..., None] * self.direction.rows(ids)

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the pairs of the direction; gradients on them are those of the direction."""
        yield from self.direction.pairs(scale)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the two-sided leaves of the direction."""
        yield from self.direction.sides()

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the leaves of the direction that meet the input."""
        yield from self.direction.entries()

    def macs(self, tokens: int) -> int:
        """Return the direction's multiply-adds, those of the norm and the scaling."""
        return self.direction.macs(tokens) + self._norm_macs() + tokens * self.shape[0]

    def _norm_macs(self) -> int:
        split = self._split()
        rank = 0 if split.pair() is None else split.pair()[0].shape[1]  # type: ignore[index]
        return math.prod(self.shape) * (1 + rank)

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return self.direction.dense_macs() + self._norm_macs() + math.prod(self.shape)

    def formula(self) -> str:
        """Return normalize(direction) scaled by m."""
        return f"{self.magnitude.formula()} normalize({self.direction.formula()})"


class ColumnNormalized(Normalized):
    """`V diag(m / n)`: every column of the direction V brought to a trained length m.

    This is the normalised form of an embedding, whose outputs are its columns; m and n are (in,).
    """

    def norm(self) -> Tensor:
        """Return the column norms of the direction, (in,), in float32 or better."""
        split = self._split()
        if split.base is None or split.others:
            dense = self.direction.dense()
            norms: Tensor = torch.linalg.vector_norm(dense, dim=0, dtype=at_least_float32(dense))
            return norms
        pair = split.pair()
        return row_norms(split.base.T, None if pair is None else (pair[1].T, pair[0].T))

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return self.direction.dense() * self.ratio()

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Scale every input channel and apply the direction."""
        if op is not LINEAR:
            return op.apply(x, self.dense().to(x.dtype), bias)
        y: Tensor = self.direction(x * self.keep()[1].to(x.dtype), bias)
        return y

    map = forward

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the direction, their entries scaled."""
        return self.direction.rows(ids) * self.keep()[1]

    def formula(self) -> str:
        """Return normalize_columns(direction) scaled by m."""
        return f"normalize_columns({self.direction.formula()}) {self.magnitude.formula()}"


def row_norms(base: Tensor, pair: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the row norms of `base + up @ down` without forming the product.

    Args:
        base: (out, in), of any floating dtype; it is not copied to float32.
        pair: up (out, r) and down (r, in), or None.
    """
    dtype = at_least_float32(base)
    square: Tensor = torch.linalg.vector_norm(base, dim=1, dtype=dtype).square()
    if pair is None:
        return square.sqrt()
    up, down = (t.to(dtype) for t in pair)
    cross = (base @ down.T.to(base.dtype)).to(dtype)
    return (square + (up * (2 * cross + up @ (down @ down.T))).sum(1)).clamp_min(0).sqrt()


class Dropped(Weight):
    """An expression whose own input passes through dropout while training; the rest of a sum sees all."""

    def __init__(self, inner: Weight, probability: float) -> None:
        super().__init__(inner.shape)
        self.inner, self.probability = inner, probability

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
        y: Tensor = self.inner(F.dropout(x, self.probability, self.training), bias, op)
        return y

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
