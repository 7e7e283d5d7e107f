"""Orthogonal blocks, cyclic shifts and the identity: the words of multiplicative changes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .kernels import applied
from .weight import Leaf, Versions, Weight, inference, same_versions, versions


class _Transform(torch.autograd.Function):
    """C = (I + S) (I - S)^-1 = 2 K - I with K = (I - S)^-1, so that dC = 2 K dS K."""

    @staticmethod
    def forward(ctx: Any, skew: Tensor) -> Tensor:
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        rotations: Tensor = (
            2 * torch.linalg.inv(identity - skew) - identity
        )  # a skew matrix has no eigenvalue 1
        ctx.save_for_backward(rotations)
        return rotations

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rotations,) = ctx.saved_tensors
        identity = torch.eye(rotations.shape[-1], dtype=rotations.dtype, device=rotations.device)
        inverse = (rotations + identity).mT
        grad_skew: Tensor = inverse @ grad @ inverse / 2
        return grad_skew


class Cayley(Leaf):
    """Rotations made from free numbers: `C_j = (I + S_j) (I - S_j)^-1` with S_j skew, so C_j^T C_j = I.

    The numbers of S_j stand above its diagonal, row by row. Kept while no gradients are wanted.

    Args:
        numbers: leaf (N, b (b - 1) / 2); zero makes the identity.
        size: b.
        name: the method's own name for the result, (N, b, b).
    """

    stored = False

    def __init__(self, numbers: Leaf, size: int, name: str) -> None:
        if numbers.shape[1] != size * (size - 1) // 2:
            raise ValueError(f"a skew matrix of size {size} has {size * (size - 1) // 2} free numbers")
        super().__init__(name, (numbers.shape[0], size, size))
        self.numbers = numbers
        self._kept: tuple[Versions | None, Tensor] | None = None

    @property
    def trainable(self) -> bool:
        """Whether the numbers are trained."""
        return self.numbers.trainable

    def skew(self) -> Tensor:
        """Return S, (N, b, b)."""
        numbers, size = self.numbers.tensor(), self.shape[1]
        numbers = numbers if numbers.dtype == torch.float64 else numbers.float()
        rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
        blocks = torch.arange(self.shape[0], device=numbers.device)[:, None]
        upper = numbers.new_zeros(self.shape).index_put((blocks, rows, columns), numbers)
        return upper - upper.mT

    def source(self) -> Tensor:
        """Return the rotations, (N, b, b), float32 or better."""
        if not inference():
            self._kept = None
            return self._rotations()
        now = versions([self.numbers.tensor()])
        if self._kept is None or not same_versions(self._kept[0], now):
            self._kept = (now, self._rotations())
        return self._kept[1]

    def _rotations(self) -> Tensor:
        return applied(_Transform, self.skew())

    def dense_macs(self) -> int:
        """Return the multiply-adds of the N eliminations and substitutions, N (b^3 / 3 + b^3)."""
        return self.shape[0] * -(-4 * self.shape[1] ** 3 // 3)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}


class Identity(Weight):
    """The identity on n channels.

    Args:
        size: n.
        dtype: of its matrix.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__((size, size))
        self.register_buffer("one", torch.ones((), dtype=dtype), persistent=False)

    one: Tensor

    def dense(self) -> Tensor:
        """Return the matrix, (n, n)."""
        return torch.eye(self.shape[0], dtype=self.one.dtype, device=self.one.device)

    def map(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x

    def macs(self, tokens: int) -> int:
        """Return 0: nothing is multiplied."""
        return 0

    @property
    def T(self) -> Weight:
        """The map itself."""
        return self

    def formula(self) -> str:
        """Return I with its shape."""
        return f"I[{self.shape[0]}]"


class Shifted(Weight):
    """A square expression whose row i is rolled right by i: entry (i, j) is inner[i, (j - i) mod n].

    A product of rank r becomes a matrix of full rank.
    """

    def __init__(self, inner: Weight) -> None:
        if inner.shape[0] != inner.shape[1]:
            raise ValueError(f"only a square expression can be shifted, and {inner.formula()} is not")
        super().__init__(inner.shape)
        self.inner = inner

    def dense(self) -> Tensor:
        """Return the matrix, (n, n)."""
        matrix = self.inner.dense()
        index = torch.arange(self.shape[0], device=matrix.device)
        return matrix.gather(1, (index - index[:, None]) % self.shape[0])

    def macs(self, tokens: int) -> int:
        """Return tokens * n^2, and forming the matrix."""
        return tokens * math.prod(self.shape) + self.inner.dense_macs()

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the inner matrix."""
        return self.inner.dense_macs()

    def formula(self) -> str:
        """Return the shifted expression."""
        return f"shift({self.inner.formula()})"
