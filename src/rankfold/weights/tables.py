"""Tables of embeddings, (vocabulary, d), that share numbers between rows: an id reads its row from parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .hashed import PRIME, CyclicChunks
from .kernels import at_least_float32
from .weight import Leaf, Weight


class Table(Weight):
    """A matrix stated by its rows."""

    def dense(self) -> Tensor:
        """Return the matrix, all rows."""
        return self.rows(torch.arange(self.shape[0], device=next(self.leaves()).tensor().device))

    def _named(self, word: str) -> str:
        parts = ", ".join(leaf.formula() for leaf in self.leaves())
        return f"{word}({parts}, {self.shape[0]} rows)"


def places(order: Leaf | None, ids: Tensor) -> Tensor:
    """Return the places of ids in an order, (vocabulary,) integers, or the ids themselves."""
    return ids if order is None else order.tensor()[ids].long()


class Folded(Table):
    """The first ids have rows of their own, all others share what is left.

        E[x] = table[p] for p < own, else table[own + (p - own) mod (n - own)],   p = order[x]

    Args:
        table: leaf (n, d).
        out: vocabulary.
        own: number of rows that are not shared, below n.
        order: leaf (vocabulary,), the place of every id; None takes the ids as they are.
    """

    def __init__(self, table: Leaf, out: int, own: int = 0, order: Leaf | None = None) -> None:
        super().__init__((out, table.shape[1]))
        self.table, self.own, self.order = table, own, order

    def slots(self, ids: Tensor) -> Tensor:
        """Return the rows of the smaller table that ids read."""
        place = places(self.order, ids)
        shared = self.own + (place - self.own) % (self.table.shape[0] - self.own)
        return torch.where(place < self.own, place, shared)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the smaller table."""
        return self.table.rows(self.slots(ids))

    def formula(self) -> str:
        """Return folded(table) with the number of rows."""
        return self._named("folded")


class QuotientRemainder(Table):
    """Row x is the entrywise product of two rows: `remainder[x mod k] quotient[x div k]`.

    Args:
        remainder: leaf (k, d).
        quotient: leaf (ceil(vocabulary / k), d).
        out: vocabulary.
    """

    def __init__(self, remainder: Leaf, quotient: Leaf, out: int) -> None:
        super().__init__((out, remainder.shape[1]))
        self.remainder, self.quotient = remainder, quotient

    def rows(self, ids: Tensor) -> Tensor:
        """Return the products."""
        size = self.remainder.shape[0]
        return self.remainder.rows(ids % size) * self.quotient.rows(ids // size)

    def formula(self) -> str:
        """Return both tables and the number of rows."""
        return self._named("quotient-remainder")


class RowTrain(Table):
    """A tensor train of three cores whose digits are those of the row and of the column together.

        E[(i_1 i_2 i_3), (j_1 j_2 j_3)] = G_1[i_1, :, j_1, :] G_2[i_2, :, j_2, :] G_3[i_3, :, j_3, :]

    Args:
        cores: leaves (n_k, r_{k-1}, d_k, r_k), r_0 = r_3 = 1; n_1 n_2 n_3 is at least the vocabulary.
        out: vocabulary.
    """

    cores: Sequence[Leaf]

    def __init__(self, cores: Sequence[Leaf], out: int) -> None:
        super().__init__((out, math.prod(core.shape[2] for core in cores)))
        self.cores = torch.nn.ModuleList(cores)  # type: ignore[assignment]  # a registered sequence

    def rows(self, ids: Tensor) -> Tensor:
        """Contract the cores; where there are many ids, the first two for all digits at once."""
        second, third = self.cores[1].shape[0], self.cores[2].shape[0]
        lead, last = ids // third, self.cores[2].tensor()[ids % third][..., 0]
        if ids.numel() < second * self.cores[0].shape[0]:
            front = self._front(lead // second, lead % second)
        else:
            front = self._all_fronts()[lead]
        return torch.matmul(front, last).flatten(-2)

    def _front(self, first: Tensor, second: Tensor) -> Tensor:
        """Return G_1 G_2 of digits (...): (..., d_1 d_2, r_2)."""
        left, middle = self.cores[0].tensor()[first][..., 0, :, :], self.cores[1].tensor()[second]
        return torch.einsum("...ar,...rbs->...abs", left, middle).flatten(-3, -2)

    def _all_fronts(self) -> Tensor:
        """Return G_1 G_2 of all digits: (n_1 n_2, d_1 d_2, r_2)."""
        left, middle = self.cores[0].tensor()[:, 0], self.cores[1].tensor()
        return torch.einsum("iar,jrbs->ijabs", left, middle).flatten(2, 3).flatten(0, 1)

    def formula(self) -> str:
        """Return the cores and the number of rows."""
        return self._named("train")


class Slots(Table):
    """Every number is read from one array, through a hash of its block, and with a random sign.

        E[x, j] = sign(g) array[(hash(g // Z) + g mod Z) mod m],   g = x d + j,   hash(b) = (a b + c) mod P

    Args:
        array: leaf (m,).
        shape: (vocabulary, d).
        block: Z, numbers that lie together.
        seed: of the hash and the signs.
    """

    def __init__(self, array: Leaf, shape: tuple[int, int], block: int = 1, seed: int = 0) -> None:
        super().__init__(shape)
        self.array, self.block, self.seed = array, block, seed
        drawn = torch.randint(1, PRIME, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
        self.factor, self.shift = drawn[:2]
        self.chunks = CyclicChunks(array.shape[0], (1, 1, 1), drawn[2])

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots and the signs of rows, (..., d) each."""
        position = ids[..., None] * self.shape[1] + torch.arange(self.shape[1], device=ids.device)
        start = (self.factor * (position // self.block % PRIME) + self.shift) % PRIME
        return (start + position % self.block) % self.array.shape[0], self.chunks.signs(position)

    def rows(self, ids: Tensor) -> Tensor:
        """Return what the rows read."""
        slots, signs = self.read(ids)
        array = self.array.tensor()
        return array[slots] * signs.to(array.dtype)

    def formula(self) -> str:
        """Return the array and the shape."""
        return f"slots({self.array.formula()}, {self.shape[0]}x{self.shape[1]})"


class Codes(Table):
    """Row x is a sequence of parts, each one of K centroids: `E[x] = [C_1[c_x1], ..., C_P[c_xP]]`.

    Args:
        codes: frozen integer leaf (vocabulary, P).
        centroids: leaf (P, K, d / P).
    """

    def __init__(self, codes: Leaf, centroids: Leaf) -> None:
        parts, _, width = centroids.shape
        super().__init__((codes.shape[0], parts * width))
        self.codes, self.centroids = codes, centroids

    def rows(self, ids: Tensor) -> Tensor:
        """Return the centroids that the codes name."""
        centroids = self.centroids.tensor()
        part = torch.arange(centroids.shape[0], device=ids.device)
        found: Tensor = centroids[part, self.codes.tensor()[ids].long()]
        return found.flatten(-2)

    def formula(self) -> str:
        """Return the codes and the centroids."""
        return f"codes({self.codes.formula()}, {self.centroids.formula()})"


class Integers(Table):
    """Row x is a row of integers times a scale of its own: `E[x] = s_x q_x / Q`, Q the largest integer.

    Args:
        integers: frozen integer leaf (vocabulary, d).
        scales: leaf (vocabulary, 1).
    """

    def __init__(self, integers: Leaf, scales: Leaf) -> None:
        super().__init__((integers.shape[0], integers.shape[1]))
        self.integers, self.scales = integers, scales

    def rows(self, ids: Tensor) -> Tensor:
        """Return the products, which are rounded once."""
        scales, integers = self.scales.rows(ids), self.integers.tensor()
        wide = at_least_float32(scales)
        return (integers[ids].to(wide) * (scales.to(wide) / torch.iinfo(integers.dtype).max)).to(scales.dtype)

    def formula(self) -> str:
        """Return the integers and their scales."""
        return f"integers({self.integers.formula()}, {self.scales.formula()})"


class Mixed(Table):
    """Groups of rows, one after another in an order, each a table of its own width: `E_g = up_g down_g`.

    Args:
        groups: pairs of leaves, up (n_g, d_g) and down (d_g, d); without a down, rows (n_g, d) themselves.
        order: leaf (vocabulary,), the place of every id; None takes the ids as they are.
    """

    ups: Sequence[Leaf]
    downs: Mapping[str, Leaf]

    def __init__(self, groups: Sequence[tuple[Leaf, Leaf | None]], order: Leaf | None = None) -> None:
        ends = [(up if down is None else down).shape[1] for up, down in groups]
        super().__init__((sum(up.shape[0] for up, _ in groups), ends[0]))
        self.order = order
        downs = {str(g): down for g, (_, down) in enumerate(groups) if down is not None}
        self.ups = torch.nn.ModuleList(up for up, _ in groups)  # type: ignore[assignment]
        self.downs = torch.nn.ModuleDict(downs)  # type: ignore[assignment]

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of the groups that the ids are in."""
        place, start = places(self.order, ids), 0
        found: Tensor | None = None
        for group, up in enumerate(self.ups):
            size = up.shape[0]
            inside = (place - start).clamp(0, size - 1)
            row = up.rows(inside)
            if str(group) in self.downs:
                row = row @ self.downs[str(group)].tensor()
            found = row if found is None else torch.where((place >= start)[..., None], row, found)
            start += size
        assert found is not None  # there is at least one group
        return found

    def formula(self) -> str:
        """Return the groups."""
        return self._named("mixed")
