"""Matrix products and entrywise products of expressions, each choosing how it is evaluated."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .blockwise import kronecker, rotated_linear
from .composites import Composite, Dropped, Factors, cast_pair
from .kernels import modulated_linear, scaled_matrix
from .leaves import Base, Dense, Foreign
from .materialise import through_matrix
from .op import LINEAR, Op
from .orthogonal import Identity
from .structured import BlockDiagonal, Diagonal, Kronecker, Reflections
from .sums import Split, Sum, added, join_pairs, wider
from .weight import Leaf, Pair, Weight, tick


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
        anchor, factors = self._anchor(), list(self.factors)
        if anchor is None:
            return _chain(factors, from_left=True)
        dtype = functools.reduce(torch.promote_types, (leaf.tensor().dtype for leaf in self.sources()))
        matrix = factors[anchor].dense().to(dtype)
        for factor in reversed(factors[:anchor]):
            matrix = factor.map(matrix.T).T
        for factor in factors[anchor + 1 :]:
            matrix = _times(matrix, factor)
        return matrix

    def _anchor(self) -> int | None:
        """Return the factor to whose rows and columns the others are applied, where they are Kronecker."""
        plain = [i for i, factor in enumerate(self.factors) if not _is_kronecker(factor)]
        return plain[0] if len(plain) == 1 and len(self.factors) > 1 else None

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
        # Kronecker factors and blocks are worth more apart, and noise between factors is lost in a product.
        apart = any(isinstance(f, Base | BlockDiagonal | Kronecker) for f in factors) or self._noisy()
        return None if apart else rank

    def _noisy(self) -> bool:
        return any(isinstance(f, Dropped) and f.active for f in self.factors)

    def turned(self) -> Split | None:
        """Return `W + up @ down` for a stored weight times reflections, or the identity plus a small product.

        W (I - V T V^T) = W - (W V T) V^T,   W (I + B A) = W + (W B) A,   (I + B A) W = W + B (A W)
        """
        base, turn = self._base_and_turn()
        if base is None or self._turned_rank() is None:
            return None
        weight, first = base.tensor(), turn is self.factors[1]
        if isinstance(turn, Reflections):
            vectors, core = (t.to(weight.dtype) for t in turn.compact())
            return Split(base=weight, trained=(weight @ vectors @ -core, vectors.T))
        pairs = [term.factored() for term in turn.terms if not isinstance(term, Identity)]  # type: ignore[union-attr]
        up, down = (t.to(weight.dtype) for t in join_pairs(pairs))  # type: ignore[union-attr]
        return Split(base=weight, trained=(weight @ up, down) if first else (up, down @ weight))

    def _base_and_turn(self) -> tuple[Base | None, Weight | None]:
        """Return the stored weight and the one map that multiplies it, where that is all."""
        bases = [f for f in self.factors if isinstance(f, Base) and f.inner is None]
        if len(self.factors) != 2 or len(bases) != 1 or isinstance(bases[0], Foreign):
            return None, None
        return bases[0], next(f for f in self.factors if f is not bases[0])

    def _rotation(self) -> BlockDiagonal | None:
        """Return the square blocks that turn the inputs of a stored weight, where that is all."""
        base, turn = self._base_and_turn()
        if base is None or not isinstance(turn, BlockDiagonal) or turn is self.factors[0]:
            return None
        count, rows, columns = turn.blocks.shape
        return turn if turn.shape == (count * rows, count * columns) and rows == columns else None

    def _turned_rank(self) -> int | None:
        """Return by what rank the one other factor changes a stored weight, where that is a small one."""
        base, turn = self._base_and_turn()
        if base is None:
            return None
        if isinstance(turn, Reflections) and turn is self.factors[1]:
            return turn.vectors.shape[1]
        if not isinstance(turn, Sum) or sum(isinstance(term, Identity) for term in turn.terms) != 1:
            return None
        found = [term.small_rank() for term in turn.terms if not isinstance(term, Identity)]
        ranks = [rank for rank in found if rank is not None]
        fits = len(ranks) == len(found) and sum(ranks) * sum(self.shape) <= math.prod(self.shape)
        return sum(ranks) if fits else None

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply through the small pair where there is one, else factor by factor or as one matrix."""
        pair, split = self.keep()
        if split is not None and split.base is not None and split.trained is not None:
            return added(x, split.base, bias, op, split.trained)
        if op is LINEAR and torch.is_grad_enabled() and (rotation := self._rotation()) is not None:
            return rotated_linear(x, self.factors[0].dense(), bias, rotation.blocks.tensor())
        if self._denser(op.tokens(x)) or (pair is None and op.groups > 1):
            return through_matrix(self, x, bias, op)
        if pair is not None:
            return op.add(op.low_rank(x, *cast_pair(pair, x)), bias)
        y: Tensor = self.factors[-1](x, op=op)
        for factor in reversed(list(self.factors)[:-1]):
            y = op.channels(y, factor)
        return op.add(y, bias)

    map = forward

    def derived(self) -> tuple[tuple[Tensor, Tensor] | None, Split | None]:
        """Return the small pair, or the sum that reflections amount to."""
        pair = self.factored()
        return pair, None if pair is not None else self.turned()

    def _denser(self, tokens: int) -> bool:
        if self._noisy():
            return False
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
        ends = self._ends()
        middle = list(self.factors)[1:-1]
        if len(middle) > 1 or not all(isinstance(end, Dense) and end.trainable for end in ends):
            return
        gate = middle[0] if middle else None
        if gate is None:
            yield Pair(ends[0], ends[1], scale, None, self)  # type: ignore[arg-type]
        elif isinstance(gate, Diagonal):
            yield Pair(ends[0], ends[1], scale, gate.vector, self)  # type: ignore[arg-type]

    def _ends(self) -> list[Weight]:
        ends = (self.factors[0], self.factors[-1])
        return [end.inner if isinstance(end, Dropped) else end for end in ends]

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
        ends = self._ends()
        assert all(isinstance(end, Dense) for end in ends)
        for factor, end, value in zip((self.factors[0], self.factors[-1]), ends, (up, down), strict=True):
            end.resize(value)  # type: ignore[operator]
            factor.shape = tuple(value.shape)
        if gate is not None:
            middle = self.factors[1]
            middle.vector.resize(gate)  # type: ignore[operator]
            middle.shape = (gate.shape[0], gate.shape[0])
        tick()

    def macs(self, tokens: int) -> int:
        """Return the sum over the factors, or what the sum that they amount to takes, if that is more."""
        total, rank = sum(factor.macs(tokens) for factor in self.factors), self._turned_rank()
        turned = 0 if rank is None else tokens * (math.prod(self.shape) + rank * sum(self.shape))
        return max(total, turned)

    def dense_macs(self) -> int:
        """Return the multiply-adds of multiplying the factors out, left to right or from the anchor."""
        anchor, factors = self._anchor(), list(self.factors)
        if anchor is not None:
            left, columns = factors[:anchor], factors[anchor].shape[1]
            total = factors[anchor].dense_macs() + sum(factor.macs(columns) for factor in left)
            return total + sum(_times_macs(self.shape[0], factor) for factor in factors[anchor + 1 :])
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


def _is_kronecker(factor: Weight) -> bool:
    if isinstance(factor, Sum):
        return all(map(_is_kronecker, factor.terms))
    return isinstance(factor, Kronecker) and not factor.nested()


def _times(matrix: Tensor, factor: Weight) -> Tensor:
    """Multiply a matrix by Kronecker products, `matrix @ factor`, which are not formed."""
    if isinstance(factor, Sum):
        return functools.reduce(torch.add, [_times(matrix, term) for term in factor.terms])
    assert isinstance(factor, Kronecker)
    return kronecker(matrix, factor.left.dense().T, factor.right.dense().T)


def _times_macs(rows: int, factor: Weight) -> int:
    if isinstance(factor, Sum):
        return sum(_times_macs(rows, term) for term in factor.terms)
    assert isinstance(factor, Kronecker)
    (a, b), (c, d) = factor.left.shape, factor.right.shape
    return rows * a * d * (c + b) + factor.left.dense_macs() + factor.right.dense_macs()


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
    dtype = wider(left, right)
    return left.to(dtype) @ right.to(dtype)


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
            return through_matrix(self, x, bias, op)
        return op.add(op.low_rank(x, *cast_pair(self.keep(), x)), bias)  # type: ignore[arg-type]

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
