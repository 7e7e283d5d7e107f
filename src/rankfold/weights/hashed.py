"""A tensor whose numbers are read, through a hash and with random signs, from an array that layers share.

The maps are computed from a few integers wherever they are needed: no index and no sign is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import applied
from .leaves import Pooled
from .weight import Leaf

PRIME = 2038074743
_MIX = (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64)
_UPPER = 2**31 - 1  # what a shift by 33 leaves of 64 bits, the sign being one of them


@dataclass(frozen=True)
class CyclicChunks:
    """The map of flat positions g of a whole model onto the m slots of an array, and the signs.

        h(g) = (hash(g // m) + g mod m) mod m,   hash(c) = ((a1 c + a2 c^2 + a3) mod P) mod m
        sign(g) = 1 - 2 (mix(g + seed) mod 2)

    Every m positions in a row are a cyclic shift of the array. mix is the finaliser of MurmurHash3 (Appleby).

    Args:
        size: m.
        place: (a1, a2, a3), odd.
        seed: of the signs.
    """

    size: int
    place: tuple[int, int, int]
    seed: int

    def shift(self, chunk: int) -> int:
        """Return hash(c)."""
        first, second, third = self.place
        return (first * chunk + second * chunk * chunk + third) % PRIME % self.size

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the slices [a, b) of the array that positions start..stop read, one after another."""
        while start < stop:
            chunk, offset = divmod(start, self.size)
            first = (self.shift(chunk) + offset) % self.size
            last = min(self.size, first + min(stop - start, self.size - offset))
            yield first, last
            start += last - first

    def slots(self, positions: Tensor) -> Tensor:
        """Return h(g) for positions of any shape."""
        if not positions.numel():
            return positions
        low, high = int(positions.min()) // self.size, int(positions.max()) // self.size
        shifts = torch.tensor([self.shift(c) for c in range(low, high + 1)], device=positions.device)
        return (shifts[positions // self.size - low] + positions % self.size) % self.size

    def signs(self, positions: Tensor) -> Tensor:
        """Return +1 or -1 for positions of any shape; products wrap around, alike on every device."""
        mixed = positions + self.seed
        for factor in _MIX:
            mixed = (mixed ^ (mixed >> 33 & _UPPER)) * factor
        return 1 - 2 * ((mixed ^ (mixed >> 33)) & 1)


class _Read(torch.autograd.Function):
    """values = pool[h(g)] sign(g) for a run of positions; backward adds every number to its slot."""

    @staticmethod
    def forward(ctx: Any, pool: Tensor, chunks: CyclicChunks, start: int, stop: int) -> Tensor:
        ctx.chunks, ctx.start, ctx.stop = chunks, start, stop
        read = torch.cat([pool[first:last] for first, last in chunks.pieces(start, stop)])
        return read * _signs(pool, chunks, start, stop)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad * _signs(grad, ctx.chunks, ctx.start, ctx.stop)
        pieces = list(ctx.chunks.pieces(ctx.start, ctx.stop))
        parts = grad.split([last - first for first, last in pieces])
        return accumulated(parts, pieces, ctx.chunks.size), None, None, None


def _signs(like: Tensor, chunks: CyclicChunks, start: int, stop: int) -> Tensor:
    return chunks.signs(torch.arange(start, stop, device=like.device)).to(like.dtype)


def accumulated(parts: Sequence[Tensor], pieces: Sequence[tuple[int, int]], size: int) -> Tensor:
    """Return an array of that size to whose slices [a, b) the parts were added."""
    total = parts[0].new_zeros(size)
    for part, (first, last) in zip(parts, pieces, strict=True):
        total = total + F.pad(part, (first, size - last))
    return total


class Hashed(Pooled):
    """A tensor read from a shared array by `CyclicChunks`, times a number: `scale sign(g) pool[h(g)]`.

    Args:
        owner: the root model, which registers the array (m,).
        key: attribute name of the array on the owner.
        name: the method's own name for it.
        shape: (out, in).
        chunks: the map.
        start: position of the tensor's first number in the whole model.
        scale: leaf of shape ().
    """

    def __init__(
        self,
        owner: nn.Module,
        key: str,
        name: str,
        shape: tuple[int, int],
        chunks: CyclicChunks,
        start: int,
        scale: Leaf,
    ) -> None:
        super().__init__(owner, key, name, shape)
        self.chunks, self.start, self.scale = chunks, start, scale

    @property
    def stop(self) -> int:
        """Position after the tensor's last number."""
        return self.start + math.prod(self.shape)

    def loads(self) -> Tensor:
        """Return how many numbers of the tensor every slot of the array serves, (m,)."""
        counts = torch.zeros(self.chunks.size, device=self.pool().device)
        for first, last in self.chunks.pieces(self.start, self.stop):
            counts[first:last] += 1
        return counts

    def source(self) -> Tensor:
        """Return the tensor."""
        values = applied(_Read, self.pool(), self.chunks, self.start, self.stop)
        return (self.scale.tensor() * values).view(self.shape)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the tensor; the others are not made."""
        if self.substitute is not None:
            return super().rows(ids)
        columns = torch.arange(self.shape[1], device=ids.device)
        positions = self.start + ids[..., None] * self.shape[1] + columns
        pool = self.pool()
        signs = self.chunks.signs(positions).to(pool.dtype)
        return self.scale.tensor() * signs * pool[self.chunks.slots(positions)]
