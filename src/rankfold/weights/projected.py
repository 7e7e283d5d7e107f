"""Tensors that are read, all together, out of one short vector through one fixed projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .leaves import Pooled
from .weight import Leaf, Weight


class Fixed(Leaf):
    """A frozen tensor that can be made again from a seed, so that no file holds it.

    Args:
        value: the tensor.
        name: the method's own name for it.
    """

    stored = False
    value: Tensor

    def __init__(self, value: Tensor, name: str) -> None:
        super().__init__(name, tuple(value.shape))
        self.register_buffer("value", value, persistent=False)

    def source(self) -> Tensor:
        """Return the tensor."""
        return self.value


_RADIX = 64  # small matrices of this size are cheaper than six passes of additions


def walsh_hadamard(x: Tensor) -> Tensor:
    """Multiply the last axis by the orthogonal Walsh-Hadamard matrix, H / sqrt(n), without forming it.

    H is a Kronecker product, so the axis is cut into factors of at most 64, each met by its own small matrix.
    The constant is applied first, so that no number on the way is larger than the norm of x.

    Args:
        x: (..., n), n a power of two.

    Example:
        >>> walsh_hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    size, step = x.shape[-1], 1
    x = x * size**-0.5
    while step < size:
        radix = min(_RADIX, size // step)
        cut, small = x.unflatten(-1, (-1, radix, step)), _sylvester(radix, x)
        x = (cut.squeeze(-1) @ small if step == 1 else small @ cut).reshape(x.shape)
        step *= radix
    return x


def _sylvester(size: int, like: Tensor) -> Tensor:
    """Return the symmetric matrix of 1 and -1."""
    matrix = like.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


class Fastfood(Weight):
    """A random projection that is applied in n log n and kept as three vectors.

        P = (n / sqrt(out |g|^2)) H G Pi H B,   H of size n = 2^ceil(log2 out), orthogonal

    of which the first `out` rows and `in` columns count. B holds the signs, Pi the order, G = diag(g) normal
    numbers; the constant lets a column have a norm near 1.

    Args:
        normal: leaf (n,), g.
        signs: (n,), 1 and -1.
        order: (n,), a permutation; row i of Pi takes position order[i].
        shape: (out, in), neither above n.
    """

    signs: Tensor
    order: Tensor

    def __init__(self, normal: Leaf, signs: Tensor, order: Tensor, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.normal = normal
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def _scale(self, normal: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(normal)
        return normal.shape[0] / math.sqrt(self.shape[0]) / length

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        normal = self.normal.tensor()
        return self.map(torch.eye(self.shape[1], dtype=normal.dtype, device=normal.device)).T

    def map(self, x: Tensor) -> Tensor:
        """Apply the factors one after another to the vector, filled up with zeros."""
        normal = self.normal.tensor().to(x.dtype)
        padded = nn.functional.pad(x, (0, normal.shape[0] - self.shape[1]))
        mixed = walsh_hadamard(padded * self.signs).index_select(-1, self.order)
        return walsh_hadamard(mixed * (self._scale(normal) * normal))[..., : self.shape[0]]

    def macs(self, tokens: int) -> int:
        """Return those of two fast transforms, and the diagonals."""
        size, radices = self.signs.shape[0], 0
        rest = size
        while rest > 1:
            radices += min(_RADIX, rest)
            rest //= _RADIX
        return tokens * 2 * size * (1 + radices)

    def dense_macs(self) -> int:
        """Return those of applying it to every row of the identity."""
        return self.macs(self.shape[1])

    @property
    def T(self) -> Weight:
        """The same factors in the opposite order."""
        return _Backwards(self)

    def formula(self) -> str:
        """Return fastfood with the shape."""
        return f"fastfood({self.normal.formula()}, {self.shape[0]}x{self.shape[1]})"


class _Backwards(Weight):
    def __init__(self, forwards: Fastfood) -> None:
        super().__init__((forwards.shape[1], forwards.shape[0]))
        self.forwards = forwards

    def dense(self) -> Tensor:
        return self.forwards.dense().T

    def map(self, x: Tensor) -> Tensor:
        of = self.forwards
        normal = of.normal.tensor().to(x.dtype)
        padded = nn.functional.pad(x, (0, normal.shape[0] - self.shape[1]))
        mixed = walsh_hadamard(padded) * (of._scale(normal) * normal)
        ordered = torch.zeros_like(mixed).index_add(-1, of.order, mixed)
        return (walsh_hadamard(ordered) * of.signs)[..., : self.shape[0]]

    def macs(self, tokens: int) -> int:
        return self.forwards.macs(tokens)

    @property
    def T(self) -> Weight:
        return self.forwards

    def formula(self) -> str:
        return f"{self.forwards.formula()}^T"


class Projection(nn.Module):
    """One fixed map from a short vector to several tensors, P theta cut into pieces.

    The pieces of a vector are formed once and read by everybody until the vector changes, so that a forward
    projects once, and a backward projects the gradients of all pieces back at once.

    Args:
        matrix: P (sum of sizes, d).
        sizes: entries of every piece.
    """

    def __init__(self, matrix: Weight, sizes: Sequence[int]) -> None:
        super().__init__()
        self.matrix, self.sizes = matrix, list(sizes)
        self._kept: tuple[Tensor, Tensor, Sequence[Tensor]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}

    def pieces(self, short: Tensor) -> Sequence[Tensor]:
        """Return the pieces of P theta, flat, in the dtype of theta.

        Args:
            short: theta (d,).
        """
        # Compilers see equal products by themselves; what stands in a parameter's place lives for one call.
        if torch.compiler.is_compiling() or type(short) is not nn.Parameter:
            return self.form(short)
        wanted = torch.is_grad_enabled() and short.requires_grad
        if self._kept is None or not self._serves(self._kept, short, wanted):
            # PyTorch does not annotate `apply`.
            pieces = _Pieces.apply(short, self) if wanted else self.form(short.detach())  # type: ignore[no-untyped-call]
            self._kept = (short, short.detach().clone(), pieces)
        found = self._kept[2]
        return found if wanted else [piece.detach() for piece in found]

    def form(self, short: Tensor) -> Sequence[Tensor]:
        """Return the pieces, formed anew."""
        pieces: Sequence[Tensor] = _in_full(self.matrix, short).split(self.sizes)
        return pieces

    @staticmethod
    def _serves(kept: tuple[Tensor, Tensor, Sequence[Tensor]], short: Tensor, wanted: bool) -> bool:
        """Whether kept pieces are those of the vector as it stands, compared by value.

        A change by way of `.data` leaves no other mark, and the vector is short.
        """
        held, value, pieces = kept
        if held is not short or value.dtype != short.dtype or value.device != short.device:
            return False
        if pieces[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        return (pieces[0].requires_grad or not wanted) and torch.equal(value, short)


class _Pieces(torch.autograd.Function):
    """The pieces of P theta. Nothing is kept for backward, so that one graph serves any number of them."""

    @staticmethod
    def forward(ctx: Any, short: Tensor, projection: Projection) -> tuple[Tensor, ...]:
        ctx.projection, ctx.dtype = projection, short.dtype
        return tuple(projection.form(short))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _in_full(ctx.projection.matrix.T, torch.cat(gradients)).to(ctx.dtype), None


def _in_full(matrix: Weight, x: Tensor) -> Tensor:
    """Apply a map to a vector in float32 or better, whatever autocast says; nothing wider is kept."""
    with torch.autocast(x.device.type, enabled=False):
        found = matrix.map(x if x.dtype == torch.float64 else x.float())
        return found.to(x.dtype, copy=True)  # not a view of what was filled up to a power of two


class Projected(Pooled):
    """A tensor that is one piece of a projection of a vector which layers share.

        value = (P theta)[piece]

    Args:
        owner: the root model, which registers theta.
        key: attribute name of theta on the owner.
        name: the method's own name for it.
        shape: of the tensor.
        projection: P, shared by all that read theta.
        piece: which of its pieces this is.
    """

    def __init__(
        self,
        owner: nn.Module,
        key: str,
        name: str,
        shape: tuple[int, ...],
        projection: Projection,
        piece: int,
    ) -> None:
        super().__init__(owner, key, name, shape)
        self.projection, self.piece = projection, piece

    def source(self) -> Tensor:
        """Return the piece in its shape."""
        return self.projection.pieces(self.pool())[self.piece].view(self.shape)
