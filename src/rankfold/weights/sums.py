"""Sums of expressions, and the one place where the order of their evaluation is chosen."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .composites import Composite, Dropped, Factors, Scaled, cast_pair
from .gates import Gated
from .kernels import grid_linear, low_rank_linear, scaled_low_rank
from .leaves import Base, Dense, Foreign
from .materialise import materialised_linear, through_matrix
from .op import LINEAR, Op, autocast_dtype
from .selection import Selection
from .shards import Repeated
from .structured import Grid, Kronecker
from .thin import inner_linear
from .weight import Leaf, Pair, Weight, inference


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

    def fused(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the output where the one term on a base has a way of its own to be added to it, or None."""
        if self.base is None or self.trained is not None or len(self.others) != 1:
            return None
        term = self.others[0]
        if isinstance(term, Selection) or (isinstance(term, Repeated) and not self.base.requires_grad):
            return term.added(x, self.base, bias)
        scale, inner = (term.scale, term.inner) if isinstance(term, Scaled) else (1.0, term)
        if inference() or isinstance(scale, Leaf) or not isinstance(inner, Kronecker):
            return None
        return inner.added(x, self.base, bias, scale)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Return all low-rank terms as one pair."""
        return join_pairs([p for p in (self.trained, self.frozen) if p is not None])


def join_pairs(pairs: list[Factors]) -> Factors | None:
    """Return the sum of products as one product, or None where there is none."""
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
        split.trained, split.frozen = join_pairs(trained), join_pairs(frozen)
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
        found = [term.small_rank() for term in self.parts()]
        ranks = [rank for rank in found if rank is not None]
        return sum(ranks) if len(ranks) == len(found) else None

    def split(self) -> Split:
        """Take the sum apart for evaluation; the one place where its order is chosen."""
        return self.keep()

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        parts = list(self.parts())
        total = parts[0].dense()
        for part in parts[1:]:
            dense = part.dense()
            total = total + dense if dense.dtype == total.dtype else total.to(wider(total, dense)) + dense
        return total

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply base and low-rank terms in one fused product, then the other terms."""
        split = self.split()
        if op is LINEAR and split.base is not None and split.grid is not None:
            return grid_linear(x, split.base, bias, *split.grid)
        fused = split.fused(x, bias) if op is LINEAR else None
        if fused is not None:
            return fused
        order = self._order(split, x, op)
        if order == "matrix":
            return through_matrix(self, x, bias, op)
        if order == "formed":
            terms = [term for term in self.parts() if any(leaf.trainable for leaf in term.sources())]
            return materialised_linear(self, x, bias, terms)
        y = self._main(split, x, bias, op)
        for term in split.others:
            if not (isinstance(term, Gated) and term.is_closed):
                y = y + term(x, op=op)
        return y

    map = forward

    def _order(self, split: Split, x: Tensor, op: Op) -> str:
        """Return the order of the fewest multiply-adds.

        applied: every term by itself. matrix: the whole matrix, whose gradient is one wide product. formed:
        the whole matrix for output and input, and every term applied for its own gradients.
        """
        if split.base is None:
            return self._order_without_base(split, x, op)
        if autocast_dtype(x) not in (torch.float32, torch.float64):
            return "applied"  # added up in half precision, the weight would round a small change away
        training, size = torch.is_grad_enabled(), math.prod(self.shape)
        pair = _numbers(split.trained) if training else 0
        if (not split.others and 2 * pair <= size) or not all(map(term_is_dense, split.others)):
            return "applied"
        tokens = op.tokens(x)
        own = [term for term in self.parts() if _plain(term) is None] if pair else split.others
        forming = sum(term.dense_macs() for term in own) + size
        applying = sum(min(term.macs(tokens), term.dense_macs() + tokens * size) for term in split.others)
        if not training:
            return "matrix" if forming < applying else "applied"
        # Of a pair that trains, two thirds of the products are for its own gradients.
        applying = 3 * applying + 2 * tokens * pair + min(tokens * pair, 2 * forming)
        costs = {"applied": applying, "matrix": 4 * forming + tokens * size}
        if op is LINEAR:
            terms = sum(term.macs(tokens) for term in split.others)
            costs["formed"] = 2 * (forming + terms + tokens * pair)
        return min(costs, key=costs.__getitem__)

    def _order_without_base(self, split: Split, x: Tensor, op: Op) -> str:
        """Return matrix where a term is as wide as the weight and forming all terms at once is cheaper."""
        if split.foreign is not None or not split.others or not all(map(term_is_dense, split.others)):
            return "applied"
        tokens, size = op.tokens(x), math.prod(self.shape)
        forming = sum(term.dense_macs() for term in self.parts()) + size
        applying = sum(term.macs(tokens) for term in self.parts())
        # In training, of three passes, the matrix is formed in two, and its gradient is taken apart in two.
        again = 4 / 3 if torch.is_grad_enabled() else 1
        return "matrix" if again * forming + tokens * size < applying else "applied"

    def _main(self, split: Split, x: Tensor, bias: Tensor | None, op: Op) -> Tensor:
        if split.base is None:
            return self._without_base(split, x, bias, op)
        if split.trained is None:
            return op.apply(x, split.base.to(x.dtype), bias)
        return added(x, split.base, bias, op, split.trained, split.frozen)

    def _without_base(self, split: Split, x: Tensor, bias: Tensor | None, op: Op) -> Tensor:
        pair = split.pair()
        low = None if pair is None else op.low_rank(x, *cast_pair(pair, x))
        if split.foreign is None:
            return op.add(x.new_zeros(()) if low is None else low, bias)
        y: Tensor = split.foreign(x, bias, op)
        return y if low is None else y + low.to(y.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the sum of the terms' rows."""
        return functools.reduce(torch.add, [term.rows(ids) for term in self.parts()])

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """Return all terms as one pair, where every one has a small form."""
        found = [term.factored() for term in self.parts()]
        pairs = [pair for pair in found if pair is not None]
        return join_pairs(pairs) if len(pairs) == len(found) else None

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


def added(
    x: Tensor,
    base: Tensor,
    bias: Tensor | None,
    op: Op,
    trained: tuple[Tensor, Tensor],
    frozen: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Apply a matrix plus one or two low-rank pairs, fused where the layer is linear."""
    if op is LINEAR and not inference():
        up, down = trained
        if frozen is None and not (down.requires_grad or base.requires_grad) and len(down) < base.shape[1]:
            return inner_linear(x, base, bias, up, down)
        return low_rank_linear(x, base, bias, up, down, *(frozen or ()))
    pair = trained if frozen is None else join_pairs([trained, frozen])
    if op is LINEAR:
        return scaled_low_rank(x, base, bias, *pair)  # type: ignore[misc]
    return op.apply(x, base.to(x.dtype), bias) + op.low_rank(x, *cast_pair(pair, x))  # type: ignore[arg-type]


def _numbers(pair: Factors | None) -> int:
    return 0 if pair is None else pair[0].numel() + pair[1].numel()


def _plain(term: Weight) -> Leaf | None:
    """Return a term that is a stored matrix, or None."""
    if isinstance(term, Base):
        return term if term.inner is None else None
    return term if isinstance(term, Dense) and len(term.shape) == 2 else None


def wider(first: Tensor, second: Tensor) -> torch.dtype:
    """Return the dtype that holds what either of two tensors holds."""
    return torch.promote_types(first.dtype, second.dtype)


def term_is_dense(term: Weight) -> bool:
    """Say whether an expression has a matrix that does not depend on the token."""
    return term.has_matrix() and not any(isinstance(m, Dropped) and m.active for m in term.modules())
