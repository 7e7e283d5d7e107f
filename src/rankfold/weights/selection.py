"""Sparse changes whose support is stored, and can be chosen anew while training runs.

    matrix[support] = values,   matrix[elsewhere] = kept where something was learnt before, else 0

The trained tensor is packed: gradient, moments and weight decay meet the entries of the support and no other.
The support and what is kept are integer and frozen leaves, saved with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FormatError
from .kernels import applied
from .leaves import Dense
from .op import autocast_dtype
from .weight import Weight

_WIDE = (torch.float32, torch.float64)


class Selection(Weight):
    """A matrix that is zero but for packed trained entries and entries that are kept.

    Args:
        values: trained leaf, one number per entry of the support.
        support: integer leaves that say where the values stand.
        kept: frozen leaf (k,), what entries outside of the support have learnt.
        kept_index: integer leaf (k,), their positions in the flattened matrix.
        shape: (out, in).

    Attributes:
        thin: keep for backward only the input channels that the support meets.
    """

    support: Sequence[Dense]
    thin: ClassVar[bool] = False

    def __init__(
        self, values: Dense, support: Sequence[Dense], kept: Dense, kept_index: Dense, shape: tuple[int, int]
    ) -> None:
        super().__init__(shape)
        self.values, self.kept, self.kept_index = values, kept, kept_index
        self.support = torch.nn.ModuleList(support)  # type: ignore[assignment]  # a registered sequence

    def positions(self) -> Tensor:
        """Return the support as positions in the flattened matrix, in the order of the packed values."""
        return _positions([leaf.tensor() for leaf in self.support], self.shape[1])

    def limits(self) -> list[int]:
        """Return how many positions every leaf of the support chooses from."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return _placed(self.shape, None, *self._tensors())

    def _tensors(self) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        support = [leaf.tensor() for leaf in self.support]
        return self.values.tensor(), support, self.kept.tensor(), self.kept_index.tensor()

    def map(self, x: Tensor) -> Tensor:
        """Apply through the matrix, which is formed again in backward rather than kept."""
        return self.added(x, None, None)

    def added(self, x: Tensor, base: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return `x @ (base + matrix).T + bias` in one product; only an input is kept for backward."""
        dtype = autocast_dtype(x)
        values, support, kept, kept_index = self._tensors()
        x, base = x.to(dtype), None if base is None else base.to(dtype)
        seen = None
        if torch.is_grad_enabled() and (values.requires_grad or (base is not None and base.requires_grad)):
            thin = self.thin and len(support[-1]) < self.shape[1]
            thin = thin and not (base is not None and base.requires_grad)
            seen = x[..., support[-1]] if thin else x.view_as(x)  # no tensor comes twice
        bias, values, kept = None if bias is None else bias.to(dtype), values.to(dtype), kept.to(dtype)
        return applied(_SelectedLinear, self.shape, x, seen, base, bias, values, kept, kept_index, *support)

    def macs(self, tokens: int) -> int:
        """Return tokens * out * in, and placing the entries."""
        return tokens * math.prod(self.shape) + self.dense_macs()

    def dense_macs(self) -> int:
        """Return the number of entries."""
        return math.prod(self.values.shape) + self.kept.shape[0]

    @torch.no_grad()
    def select(self, *support: Tensor) -> None:
        """Let other entries train from now on; the matrix stays what it is, bit for bit.

        Entries that leave keep what they have learnt, those that return take it with them.

        Args:
            support: the new integer tensors.
        """
        change = self.dense().flatten()
        for leaf, tensor in zip(self.support, support, strict=True):
            leaf.resize(tensor)
        positions = self.positions()
        self.values.resize(change[positions].view([len(part) for part in support]))
        change[positions] = 0
        left = change.nonzero().flatten()
        self.kept.resize(change[left])
        self.kept_index.resize(left)

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the sizes of tensors that are about to be copied in, by leaf name.

        Where one is missing or has another number of dimensions, everything is left as it is.

        Raises:
            FormatError: they do not belong together, or a position lies outside of the matrix.
        """
        leaves = [self.values, self.kept, *self.support, self.kept_index]
        given = [tensors.get(leaf.name) for leaf in leaves]
        found = [
            v for v, leaf in zip(given, leaves, strict=True) if v is not None and v.dim() == len(leaf.shape)
        ]
        if len(found) < len(leaves):
            return
        values, kept, *positions = found
        for index, limit in zip(positions, [*self.limits(), math.prod(self.shape)], strict=True):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < limit:
                raise FormatError(f"selected positions lie outside of a weight {self._size()}")
        *support, kept_index = positions
        if [len(part) for part in support] != list(values.shape) or len(kept) != len(kept_index):
            raise FormatError(f"the selected entries of a weight {self._size()} and their positions differ")
        for leaf, value in zip(leaves, found, strict=True):
            if tuple(value.shape) != leaf.shape:
                leaf.resize(torch.empty_like(value))

    def _size(self) -> str:
        return "x".join(map(str, self.shape))

    def formula(self) -> str:
        """Return the values and what is kept, with their positions and all shapes."""
        support = " x ".join(leaf.formula() for leaf in self.support)
        kept = f"{self.kept.formula()} at {self.kept_index.formula()}"
        return f"{self._word}({self.values.formula()} at {support}, {kept}, {self._size()})"

    _word: ClassVar[str] = "selected"


class Scattered(Selection):
    """Packed entries anywhere: values (n,) at positions (n,) of the flattened matrix."""

    def limits(self) -> list[int]:
        """Return out * in."""
        return [math.prod(self.shape)]


class Rectangle(Selection):
    """A trained sub-matrix: values (|X|, |Y|) at the crossings of rows X and columns Y."""

    _word = "rectangle"

    def limits(self) -> list[int]:
        """Return out and in."""
        return [self.shape[0], self.shape[1]]


class ThinRectangle(Rectangle):
    """A trained sub-matrix that keeps x[:, Y] for backward and multiplies dy[:, X]^T x[:, Y] only."""

    thin = True


@runtime_checkable
class Adopting(Protocol):
    """An expression whose sizes training changes."""

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the sizes of tensors that are about to be copied in, by leaf name."""


def adopt_selections(expression: Weight, tensors: Mapping[str, Tensor]) -> None:
    """Let whatever changes its size in training take that of tensors about to be copied in, by leaf name.

    A weight that changes its form in training takes the form that they have.

    Raises:
        FormatError: they do not belong together.
    """
    for part in list(expression.modules()):
        if isinstance(part, Adopting):
            part.adopt(tensors)


def _positions(support: Sequence[Tensor], width: int) -> Tensor:
    if len(support) == 1:
        return support[0]
    rows, columns = support
    return (rows[:, None] * width + columns).flatten()


def _placed(
    shape: tuple[int, ...],
    base: Tensor | None,
    values: Tensor,
    support: Sequence[Tensor],
    kept: Tensor,
    kept_index: Tensor,
) -> Tensor:
    """Return the matrix in memory of its own, on top of a base where there is one."""
    whole = values.new_zeros(shape) if base is None else base.clone(memory_format=torch.contiguous_format)
    flat = whole.view(-1)
    flat = flat.index_add_(0, _positions(support, shape[1]), values.flatten())
    return flat.index_add_(0, kept_index, kept).view(shape)


class _SelectedLinear(torch.autograd.Function):
    """y = x (W + matrix)^T + bias; the gradient of the values is read where they stand.

    `seen` is the part of x that their gradient needs: all of it, or the columns of a rectangle. It comes as
    an argument of its own so that a second derivative sees where it is from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shape: tuple[int, ...],
        x: Tensor,
        seen: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        values: Tensor,
        kept: Tensor,
        kept_index: Tensor,
        *support: Tensor,
    ) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(seen, weight, values, kept, kept_index, *support)
        if weight is None or x.dtype in _WIDE:
            return F.linear(x, _placed(shape, weight, values, support, kept, kept_index), bias)
        # In half precision the sum would round a small change away: keep the two products apart.
        y = F.linear(x, weight, bias)
        change = _placed(shape, None, values, support, kept, kept_index)
        y.view(-1, shape[0]).addmm_(x.reshape(-1, shape[1]), change.T)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight, values, kept, kept_index, *support = ctx.saved_tensors
        _, needs_x, _, needs_weight, needs_bias, needs_values = ctx.needs_input_grad[:6]
        flat, grad_x, whole, grad_values = grad.reshape(-1, grad.shape[-1]), None, None, None
        if needs_x and (weight is None or grad.dtype in _WIDE):
            grad_x = flat @ _placed(ctx.shape, weight, values, support, kept, kept_index)
        elif needs_x:
            change = _placed(ctx.shape, None, values, support, kept, kept_index)
            grad_x = (flat @ weight).addmm_(flat, change)
        if needs_weight or needs_values:
            tokens = seen.reshape(-1, seen.shape[-1])
            if seen.shape[-1] < ctx.shape[1]:
                grad_values = flat[:, support[0]].T @ tokens
            else:
                whole = flat.T @ tokens
                grad_values = whole.flatten()[_positions(support, ctx.shape[1])].view(values.shape)
        return (
            None,
            None if grad_x is None else grad_x.view(*grad.shape[:-1], ctx.shape[1]),
            None,
            whole if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            grad_values if needs_values else None,
            *([None] * (2 + len(support))),
        )
