"""Random expressions of a given shape, over every leaf and composite of the weight language."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold import weights as w
from rankfold.linalg import NormalFloat, quantise
from rankfold.weights import Leaf, Weight

Shape = tuple[int, int]


class Held(nn.Module):
    """Holds a stored weight or a pool, as a layer or a model would."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)

    def matrix(self) -> Tensor:
        """Return the stored weight."""
        return self.value


@dataclass
class Maker:
    """Draws expressions; every tensor comes from one seeded generator, every leaf has a name of its own.

    Attributes:
        draw: of a hypothesis strategy.
        dtype: of the tensors.
        trainable: whether pools and banks are trained too.
    """

    draw: Callable[..., object]
    dtype: torch.dtype = torch.float64
    names: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.integer(0, 2**31))

    def integer(self, low: int, high: int) -> int:
        """Draw a whole number in [low, high]."""
        return self.draw(st.integers(low, high))  # type: ignore[return-value]

    def one_of(self, *choices: object) -> object:
        """Draw one of the choices."""
        return self.draw(st.sampled_from(choices))

    def values(self, *shape: int) -> Tensor:
        """Return normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def indices(self, high: int, count: int) -> Tensor:
        """Return positions below `high`."""
        return torch.randint(high, (count,), generator=self.generator)

    def name(self) -> str:
        """Return a name that no other leaf has."""
        self.names += 1
        return f"leaf{self.names}"

    # Leaves -------------------------------------------------------------------------------------------

    def leaf(self, *shape: int) -> Leaf:
        """Return a leaf from any source."""
        make = self.one_of(
            self.dense, self.dense, self.pooled, self.gathered, self.seeded, self.mixed, self.masked,
            self.joined, self.drawn, self.projected,
        )  # fmt: skip
        return make(*shape)  # type: ignore[operator,no-any-return]

    def dense(self, *shape: int) -> Leaf:
        """Return a leaf that owns its tensor."""
        return w.Dense(self.values(*shape), self.name(), trainable=bool(self.integer(0, 1)))

    def pooled(self, *shape: int) -> Leaf:
        """Return a slice of a pool."""
        return w.Pooled(Held(self.values(*(n + 1 for n in shape))), "value", self.name(), shape)

    def gathered(self, *shape: int) -> Leaf:
        """Return numbers gathered from a pool, with coefficients."""
        index = torch.randint(5, shape, generator=self.generator)
        pool = Held(self.values(5).abs() + 0.1).requires_grad_(bool(self.integer(0, 1)))
        return w.Pooled(pool, "value", self.name(), shape, index, self.values(*shape))

    def seeded(self, *shape: int) -> Leaf:
        """Return a drawn leaf."""
        return w.Seeded(self.name(), shape, self.integer(0, 99), dtype=self.dtype)

    def mixed(self, *shape: int) -> Leaf:
        """Return a leaf mixed from a bank."""
        return w.Mixture(self.dense(3), self.dense(3, *shape), self.name())

    def joined(self, *shape: int) -> Leaf:
        """Return a leaf of two halves, either of which may be trained."""
        cut = shape[0] // 2
        return w.Joined(self.dense(cut, *shape[1:]), self.dense(shape[0] - cut, *shape[1:]), 0, self.name())

    def drawn(self, *shape: int) -> Leaf:
        """Return a leaf mixed from matrices that are drawn again whenever they are met."""
        offset = self.values(*shape) if self.integer(0, 1) else None
        return w.RandomMixture(self.dense(3), self.name(), shape, self.integer(0, 99), offset)

    def projected(self, *shape: int) -> Leaf:
        """Return a piece of a projection of a pool, which may be trained."""
        size, pool = math.prod(shape), Held(self.values(3)).requires_grad_(bool(self.integer(0, 1)))
        projection = w.Projection(w.Fixed(self.values(size + 2, 3), "P"), [2, size])
        return w.Projected(pool, "value", self.name(), shape, projection, 1)

    def masked(self, *shape: int) -> Leaf:
        """Return a leaf of which about half of the entries count."""
        mask = torch.rand(shape, generator=self.generator) < 0.6
        return w.Masked(self.dense(*shape), mask, self.name())

    def base(self, *shape: int) -> Leaf:
        """Return a stored weight."""
        return w.Base(Held(self.values(*shape)), (shape[0], shape[1]))

    # Structured maps ----------------------------------------------------------------------------------

    def structured(self, shape: Shape) -> Weight:
        """Return a map without sub-expressions."""
        out, columns = shape
        makers: list[Callable[[Shape], Weight]] = [
            lambda s: self.leaf(*s),
            lambda s: self.base(*s),
            self.block_diagonal,
            self.sparse,
            self.scattered,
            self.rectangle,
            self.tucker,
            self.train,
            self.bases,
            self.channels,
            self.offset,
            self.spectral,
            self.monarch,
            self.hashed,
            self.quantised,
            lambda s: w.Repeated(self.leaf(s[0], self.integer(1, s[1])), s[1]),
            lambda s: w.Gram(self.leaf(max(s), self.integer(1, 3)), s),
            lambda s: w.Select(self.indices(s[1], s[0]), s[1]),
            lambda s: w.Select(self.indices(s[0], s[1]), s[0]).T,
        ]
        if out == columns:
            makers += [
                lambda s: w.Diagonal(self.leaf(s[0])),
                lambda s: w.Permutation(torch.randperm(s[0], generator=self.generator)),
                lambda s: w.Reflections(self.dense(s[0], self.integer(1, 4))),
            ]
        if out % 2 == columns % 2 == 0:
            rank = 2 * self.integer(1, 2)
            makers.append(lambda s: w.Grid(self.leaf(2, s[0] // 2, rank), self.leaf(2, rank, s[1] // 2)))
        return self.one_of(*makers)(shape)  # type: ignore[operator,no-any-return]

    def block_diagonal(self, shape: Shape) -> Weight:
        """Return diagonal blocks, cropped where they do not divide the shape."""
        count = self.integer(1, min(3, *shape))
        return w.BlockDiagonal(self.leaf(count, -(-shape[0] // count), -(-shape[1] // count)), shape)

    def monarch(self, shape: Shape) -> Weight:
        """Return two block-diagonal factors around a permutation, cropped where they do not divide."""
        count = self.integer(1, min(3, *shape))
        rows, columns = (-(-side // count) for side in shape)
        inner = self.integer(1, 4)
        return w.Monarch(self.leaf(count, rows, inner), self.leaf(count, inner, columns), shape)

    def hashed(self, shape: Shape) -> Weight:
        """Return numbers read from an array through a hash."""
        size = self.integer(1, 40)
        pool = Held(self.values(size)).requires_grad_(bool(self.integer(0, 1)))
        chunks = w.CyclicChunks(size, (12345, 678901, 2345), 31415)
        scale = w.Dense(self.values().abs() + 0.1, self.name(), trainable=False)
        return w.Hashed(pool, "value", self.name(), shape, chunks, self.integer(0, 99), scale)

    def quantised(self, shape: Shape) -> Weight:
        """Return a matrix in a format of few bits."""
        form = NormalFloat(self.one_of(2, 3, 4, 8), 8, self.one_of(None, 4), 4, "bf16")  # type: ignore[arg-type]
        tensors = quantise(self.values(*shape), form)
        leaves = {n: w.Dense(t, self.name(), trainable=False) for n, t in tensors.items()}
        return w.Quantised(form, leaves, shape, self.dtype)

    def sparse(self, shape: Shape) -> Weight:
        """Return a map with a thin or a thick support."""
        size = shape[0] * shape[1]
        count = self.integer(1, size)
        place = torch.randperm(size, generator=self.generator)[:count]
        return w.Sparse(self.leaf(count), place // shape[1], place % shape[1], shape)

    def scattered(self, shape: Shape) -> Weight:
        """Return packed entries, some of which are kept only."""
        size = shape[0] * shape[1]
        place = torch.randperm(size, generator=self.generator)
        count = self.integer(1, size)
        support = [w.Dense(place[:count], self.name(), trainable=False)]
        return w.Scattered(self.dense(count), support, *self._kept(place[count : count + 2]), shape)

    def rectangle(self, shape: Shape) -> Weight:
        """Return a sub-matrix of either kind."""
        orders = [torch.randperm(n, generator=self.generator) for n in shape]
        chosen = [order[: self.integer(1, len(order))].sort().values for order in orders]
        support = [w.Dense(part, self.name(), trainable=False) for part in chosen]
        kind = self.one_of(w.Rectangle, w.ThinRectangle)
        values = self.dense(*(len(part) for part in chosen))
        return kind(values, support, *self._kept(torch.zeros(0, dtype=torch.long)), shape)  # type: ignore[operator,no-any-return]

    def _kept(self, positions: Tensor) -> tuple[Leaf, Leaf]:
        values = w.Dense(self.values(len(positions)), self.name(), trainable=False)
        return values, w.Dense(positions, self.name(), trainable=False)

    def tucker(self, shape: Shape) -> Weight:
        """Return a Tucker map, the columns split into channels and a window where they can be."""
        sizes = [shape[0], *_split(shape[1], self.integer(1, 3))]
        ranks = [min(self.integer(1, 3), size) for size in sizes]
        factors = [self.leaf(size, rank) for size, rank in zip(sizes, ranks, strict=True)]
        return w.Tucker(self.leaf(*ranks), factors)

    def bases(self, shape: Shape) -> Weight:
        """Return frozen bases with scales between them."""
        (small, large), count, rank = sorted(shape), self.integer(1, 3), self.integer(1, 3)
        up, down = self.seeded(large, count, rank), self.seeded(rank, small)
        return w.ScaledBases(
            up, down, self.dense(count, rank), self.dense(count, small), wide=shape[1] > shape[0]
        )

    def channels(self, shape: Shape) -> Weight:
        """Return a few whole columns."""
        place = torch.randperm(shape[1], generator=self.generator)[: self.integer(1, shape[1])]
        index = w.Dense(place, self.name(), trainable=False)
        return w.Channels(self.leaf(shape[0], len(place)), index, shape[1], self.integer(1, 2) / 2)

    def offset(self, shape: Shape) -> Weight:
        """Return a matrix whose rows are all one vector."""
        return w.Offset(self.leaf(1, shape[1]), shape[0])

    def spectral(self, shape: Shape) -> Weight:
        """Return outer factors around a core or a diagonal, or a product whose terms are ordered."""
        rank, kind = self.integer(1, 4), self.integer(0, 2)
        left, right = self.leaf(shape[0], rank), self.leaf(rank, shape[1])
        if kind == 0:
            return w.Ordered(left, right)
        return w.Spectral(left, self.leaf(*(rank,) * kind), right)

    def train(self, shape: Shape) -> Weight:
        """Return a tensor train."""
        outputs, inputs = _split(shape[0], self.integer(1, 2)), _split(shape[1], self.integer(1, 3))
        sizes = [*outputs, *inputs]
        ranks = [1, *(self.integer(1, 3) for _ in sizes[1:]), 1]
        cores = [self.leaf(ranks[i], size, ranks[i + 1]) for i, size in enumerate(sizes)]
        return w.TensorTrain(cores, len(outputs))

    # Composites ---------------------------------------------------------------------------------------

    def expression(self, shape: Shape, depth: int) -> Weight:
        """Return an expression of at most that many levels."""
        if not depth:
            return self.structured(shape)
        makers = (
            self.structured, self.sum, self.product, self.product, self.scaled, self.hadamard, self.modulated,
            self.normalized, self.kronecker, self.transposed, self.dropped, self.standing,
            self.guided,
        )  # fmt: skip
        make = self.one_of(*makers)
        return make(shape) if make == self.structured else make(shape, depth - 1)  # type: ignore[operator,no-any-return]

    def sum(self, shape: Shape, depth: int) -> Weight:
        """Return two or three terms."""
        terms = [self.expression(shape, depth) for _ in range(self.integer(2, 3))]
        return sum(terms[1:], terms[0])

    def product(self, shape: Shape, depth: int) -> Weight:
        """Return a product, thin or wide inside."""
        inner = self.integer(1, 9)
        return self.expression((shape[0], inner), depth) @ self.expression((inner, shape[1]), depth)

    def scaled(self, shape: Shape, depth: int) -> Weight:
        """Return a constant or a scalar leaf times an expression."""
        scale = self.dense() if self.integer(0, 1) else float(self.one_of(-1.0, 0.5, 1.0, 3.0))  # type: ignore[arg-type]
        return w.Scaled(scale, self.expression(shape, depth))

    def hadamard(self, shape: Shape, depth: int) -> Weight:
        """Return an entrywise product."""
        return self.expression(shape, depth) * self.expression(shape, depth)

    def modulated(self, shape: Shape, depth: int) -> Weight:
        """Return an expression times one plus another."""
        return w.Modulated(self.expression(shape, depth), self.expression(shape, depth))

    def normalized(self, shape: Shape, depth: int) -> Weight:
        """Return an expression with rows, or columns, of trained length."""
        detach, axis = bool(self.integer(0, 1)), self.integer(0, 1)
        kind = (w.Normalized, w.ColumnNormalized)[axis]
        return kind(self.expression(shape, depth), self.leaf(shape[axis]), detach=detach)

    def kronecker(self, shape: Shape, depth: int) -> Weight:
        """Return a Kronecker product."""
        (a, b), (c, d) = _split(shape[0], 2), _split(shape[1], 2)
        return w.Kronecker(self.expression((a, c), depth), self.expression((b, d), depth))

    def transposed(self, shape: Shape, depth: int) -> Weight:
        """Return the transpose of an expression."""
        return self.expression((shape[1], shape[0]), depth).T

    def dropped(self, shape: Shape, depth: int) -> Weight:
        """Return an expression with dropout, which does nothing in evaluation."""
        return w.Dropped(self.expression(shape, depth), 0.5)

    def guided(self, shape: Shape, depth: int) -> Weight:
        """Return an expression beside a dense guide."""
        share = w.Dense(self.values(2).abs(), self.name(), trainable=False)
        return w.Guided(self.expression(shape, depth), self.dense(*shape), share)  # type: ignore[arg-type]

    def standing(self, shape: Shape, depth: int) -> Weight:
        """Return a change around a stored weight in whose place another expression stands."""
        base = self.base(*shape)
        base.stand_on(self.expression(shape, depth).eval())  # type: ignore[attr-defined]
        return base + self.expression(shape, depth)


def _split(size: int, parts: int) -> list[int]:
    """Split a number into factors, the smallest first found; ones where it cannot be split further."""
    factors = []
    for _ in range(parts - 1):
        factor = next((n for n in (2, 3, 5, 7) if size % n == 0 and size > n), 1)
        factors.append(factor)
        size //= factor
    return [*factors, size]


@st.composite
def expressions(draw: Callable[..., object], depth: int = 3, dtype: torch.dtype = torch.float64) -> Weight:
    """Draw an expression in evaluation mode."""
    make = Maker(draw, dtype)
    shape = (make.integer(1, 9), make.integer(1, 9))
    return make.expression(shape, depth).eval()
