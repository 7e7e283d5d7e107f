"""Leaves: where the tensors of an expression come from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import Incompatible
from .op import LINEAR, Op
from .weight import Leaf, Weight


class Dense(Leaf):
    """A tensor that the expression owns, trained or frozen.

    Args:
        value: the tensor; a matrix (out, in) unless a structured leaf reads it.
        name: the method's own name for it.
        trainable: registered as a Parameter if true, as a buffer otherwise.
    """

    value: Tensor

    def __init__(self, value: Tensor, name: str, *, trainable: bool) -> None:
        super().__init__(name, tuple(value.shape))
        if trainable:
            self.value = nn.Parameter(value.detach().contiguous())
        else:
            self.register_buffer("value", value.detach().contiguous())

    def source(self) -> Tensor:
        """Return the tensor from where it lives."""
        return self.value

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the leaf itself, where it is a trained matrix."""
        if self.trainable and len(self.shape) == 2:
            yield self, 1

    def transfer(self) -> tuple[nn.Module, str]:
        """Return the module and the attribute that hold the tensor, for saving and loading."""
        return self, "value"

    @torch.no_grad()
    def resize(self, value: Tensor) -> None:
        """Hold a tensor of another shape from now on; a trained one stays the same Parameter."""
        value = value.to(self.value.device, self.value.dtype).contiguous()
        self.value.grad = None
        # A graph that is still held, such as that of the last loss, keeps the node that accumulates gradients
        # of the old shape, and the next graph would use it too. A change of dtype makes PyTorch let go of it.
        other = torch.float16 if value.dtype != torch.float16 else torch.float32
        self.value.data = torch.empty(0, dtype=other, device=value.device)
        self.value.data = value
        self.shape = tuple(value.shape)


def trained(value: Tensor, name: str = "trained") -> Dense:
    """Return a trained leaf that owns `value`.

    Example:
        >>> import torch
        >>> trained(torch.zeros(4, 2), "up")
        up*[4x2]
    """
    return Dense(value, name, trainable=True)


def frozen(value: Tensor, name: str = "frozen") -> Dense:
    """Return a frozen leaf that owns `value`."""
    return Dense(value, name, trainable=False)


class Holder(Protocol):
    """What a layer offers to the leaf that stands for its stored weight."""

    def matrix(self) -> Tensor:
        """Return the stored weight as a matrix (out, in)."""


class Base(Leaf):
    """The stored weight of an adapted layer, read in place and never owned.

    The layer keeps its Parameter under its old name, so ties, checkpoints and `state_dict` names work by
    themselves. The reference to the layer is not registered. Where several adapters are active at once,
    `inner` is the expression of the adapter below this one.
    """

    def __init__(self, holder: Holder, shape: tuple[int, int]) -> None:
        super().__init__("W0", shape)
        self._holder = (holder,)
        self._inner: tuple[Weight, ...] = ()

    def identity(self) -> Tensor:
        """Return a tensor whose memory and version tell whether the stored weight has changed."""
        return self.tensor()

    @property
    def inner(self) -> Weight | None:
        """The expression that stands in the base's place, if any."""
        return self._inner[0] if self._inner else None

    def below(self) -> Weight | None:
        """Return the expression that stands in the base's place, if any."""
        return self.inner

    def stand_on(self, expression: Weight | None) -> None:
        """Let an expression stand in the base's place; it is not registered here."""
        self._inner = () if expression is None else (expression,)

    stored = False  # belongs to the model, not to the adapter

    def source(self) -> Tensor:
        """Return the stored matrix itself."""
        return self._holder[0].matrix()

    def dense(self) -> Tensor:
        """Return the matrix of whatever stands here."""
        return self.tensor() if self.inner is None else self.inner.dense()

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply whatever stands here."""
        if self.inner is not None:
            result: Tensor = self.inner(x, bias, op)
            return result
        return op.apply(x, self.tensor().to(x.dtype), bias)

    map = forward

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of whatever stands here."""
        return super().rows(ids) if self.inner is None else self.inner.rows(ids)

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds of whatever stands here."""
        return super().macs(tokens) if self.inner is None else self.inner.macs(tokens)

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming whatever stands here."""
        return 0 if self.inner is None else self.inner.dense_macs()

    def formula(self) -> str:
        """Return `W0` and its shape, or the formula that stands in its place."""
        return f"W0[{'x'.join(map(str, self.shape))}]" if self.inner is None else self.inner.bracketed()


class Moved(Base):
    """A stored weight that training moves: read from a copy, so that the layer keeps its own.

        W = W0 + everything that was moved into it

    The copy is held in float32 or better, whatever the layer's dtype, so that thousands of small changes are
    not rounded away.

    Args:
        holder: the layer.
        value: (out, in), the stored weight to begin with.
    """

    stored = True
    value: Tensor

    def __init__(self, holder: Holder, value: Tensor) -> None:
        super().__init__(holder, (value.shape[0], value.shape[1]))
        self.name = "base"
        self.register_buffer("value", value.detach().clone())

    def identity(self) -> Tensor:
        """Return the copy."""
        return self.value

    def source(self) -> Tensor:
        """Return the copy."""
        return self.value

    @torch.no_grad()
    def move(self, change: Tensor) -> None:
        """Add a change (out, in) to the weight."""
        self.value += change.to(self.value.dtype)

    def transfer(self) -> tuple[nn.Module, str]:
        """Return the module and the attribute that hold the copy, for saving and loading."""
        return self, "value"

    def stand_on(self, expression: Weight | None) -> None:
        """Refuse: what is moved is the stored weight.

        Raises:
            Incompatible: an expression is to stand below.
        """
        if expression is not None:
            raise Incompatible("a weight that training moves cannot stand on another adapter's change")

    def formula(self) -> str:
        """Return `W` and its shape, or the formula that stands in its place."""
        return f"W[{'x'.join(map(str, self.shape))}]" if self.inner is None else self.inner.bracketed()


def stack(expression: Weight) -> Iterator[tuple[Base, Weight | None]]:
    """Yield every base of an expression and of those below it, with what stands in its place."""
    for leaf in expression.leaves():
        if isinstance(leaf, Base):
            below = leaf.below()
            yield leaf, below
            if below is not None:
                yield from stack(below)


@contextlib.contextmanager
def standing(order: Sequence[tuple[Base, Weight | None]]) -> Iterator[None]:
    """Within the block, the given expressions stand in the bases' places."""
    before = [(base, base.below()) for base, _ in order]
    for base, below in order:
        base.stand_on(below)
    try:
        yield
    finally:
        for base, below in before:
            base.stand_on(below)


class Foreign(Base):
    """The stored weight of a layer that keeps it in a form of its own, such as a quantised linear.

    The layer's own forward is called, and its matrix is formed only where it is asked for.
    """

    trainable = False  # no form of its own takes a gradient

    def identity(self) -> Tensor:
        """Return a tensor whose memory and version tell whether the stored weight has changed."""
        return self._holder[0].identity()  # type: ignore[attr-defined,no-any-return]

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Call the foreign module, which adds its own bias: `bias` is that one, or None to leave it out."""
        if self.inner is not None:
            result: Tensor = self.inner(x, bias, op)
            return result
        return self._holder[0].call(x, biased=bias is not None)  # type: ignore[attr-defined,no-any-return]

    map = forward


class Pooled(Leaf):
    """A tensor read out of one that layers share: a slice, or a gather times a coefficient.

        value = pool[:rows, :columns]            or            value = pool[index] * coefficient

    Where the pool has rows, whole rows are gathered and laid one after another.

    Args:
        owner: the root model, which registers the pool as a parameter or a buffer.
        key: attribute name of the pool on the owner.
        name: the method's own name for it.
        shape: shape of the tensor read out; a slice starts at zero in every dimension.
        index: positions in a one-dimensional pool, of the given shape, or rows (..., k) of a pool (n, m) for
            a shape (..., k m); None takes the leading slice.
        coefficient: multiplies the gathered numbers, of the given shape; None means 1.
    """

    stored = False  # the pool is stored once, by its owner
    index: Tensor | None
    coefficient: Tensor | None

    def __init__(
        self,
        owner: nn.Module,
        key: str,
        name: str,
        shape: tuple[int, ...],
        index: Tensor | None = None,
        coefficient: Tensor | None = None,
    ) -> None:
        super().__init__(name, shape)
        self._owner, self.key = (owner,), key
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("coefficient", coefficient, persistent=False)

    @property
    def trainable(self) -> bool:
        """Whether the pool is trained."""
        return self.pool().requires_grad

    def own(self, owner: nn.Module, key: str) -> None:
        """Read the pool from another module from now on; the module is not registered here."""
        self._owner, self.key = (owner,), key

    def pool(self) -> Tensor:
        """Return the shared tensor."""
        shared: Tensor = getattr(self._owner[0], self.key)
        return shared

    def source(self) -> Tensor:
        """Return the slice or the gather."""
        if self.index is None:
            return self.pool()[tuple(slice(n) for n in self.shape)]
        gathered = self.pool()[self.index].reshape(self.shape)
        return gathered if self.coefficient is None else gathered * self.coefficient


class Seeded(Leaf):
    """A frozen tensor drawn from a seed, never stored: drawn on the CPU, so alike on every device.

    Args:
        name: the method's own name for it.
        shape: shape of the tensor.
        seed: of the generator.
        std: standard deviation of the normal distribution.
        dtype: of the tensor.
    """

    stored = False
    value: Tensor

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        seed: int,
        std: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(name, shape)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "value", std * torch.randn(shape, generator=generator, dtype=dtype), persistent=False
        )

    def source(self) -> Tensor:
        """Return the drawn tensor."""
        return self.value


class Mixture(Leaf):
    """A tensor mixed from a bank by trained coefficients: `value = sum_j c_j bank_j`.

    Args:
        coefficients: leaf of shape (k,).
        bank: leaf of shape (k, *shape).
        name: the method's own name for the result.
    """

    stored = False

    def __init__(self, coefficients: Leaf, bank: Leaf, name: str) -> None:
        super().__init__(name, bank.shape[1:])
        self.coefficients, self.bank = coefficients, bank

    @property
    def trainable(self) -> bool:
        """Whether the coefficients or the bank are trained."""
        return self.coefficients.trainable or self.bank.trainable

    def source(self) -> Tensor:
        """Return the mixed tensor."""
        mixed: Tensor = torch.tensordot(self.coefficients.tensor(), self.bank.tensor(), 1)
        return mixed


class Masked(Leaf):
    """A tensor of which only the entries under a fixed mask count: `value = leaf * mask`.

    Where the mask is several times as large as the leaf, the leaf is repeated under it.
    """

    stored = False
    mask: Tensor

    def __init__(self, inner: Leaf, mask: Tensor, name: str) -> None:
        super().__init__(name, tuple(mask.shape))
        self.inner = inner
        self.register_buffer("mask", mask, persistent=False)

    @property
    def trainable(self) -> bool:
        """Whether the masked tensor is trained."""
        return self.inner.trainable

    def source(self) -> Tensor:
        """Return the masked tensor."""
        value = self.inner.tensor()
        times = [whole // part for whole, part in zip(self.mask.shape, value.shape, strict=True)]
        return (value if max(times, default=1) == 1 else value.repeat(times)) * self.mask


class Joined(Leaf):
    """Two tensors, one after the other along an axis: a tensor of which one part trains and another does not.

    Args:
        first, second: leaves that agree in every other axis.
        axis: along which they are joined.
        name: the method's own name for the result.
    """

    stored = False

    def __init__(self, first: Leaf, second: Leaf, axis: int, name: str) -> None:
        shape = list(first.shape)
        shape[axis] += second.shape[axis]
        super().__init__(name, tuple(shape))
        self.first, self.second, self.axis = first, second, axis

    @property
    def trainable(self) -> bool:
        """Whether one of the two is trained."""
        return self.first.trainable or self.second.trainable

    def source(self) -> Tensor:
        """Return the joined tensor."""
        return torch.cat([self.first.tensor(), self.second.tensor()], self.axis)


def adopt_ranks(expression: Weight, tensors: Mapping[str, Tensor]) -> None:
    """Let trained products take the ranks of tensors that are about to be copied into them, by leaf name.

    A product whose tensors do not fit together is left as it is.
    """
    for pair in expression.pairs():
        leaves = [pair.up, pair.down, *([pair.gate] if isinstance(pair.gate, Dense) else [])]
        values = [tensors.get(leaf.name) for leaf in leaves]
        if any(value is None for value in values):
            continue
        rank = values[1].shape[0] if values[1].dim() == 2 else -1  # type: ignore[union-attr]
        wanted = [(pair.up.shape[0], rank), (rank, pair.down.shape[1]), (rank,)]
        fits = all(tuple(v.shape) == shape for v, shape in zip(values, wanted, strict=False))  # type: ignore[union-attr]
        if fits and rank not in (-1, pair.up.shape[1]):
            pair.owner.resize(*(torch.empty_like(v) for v in values))  # type: ignore[arg-type]
    _adopt_starts(expression, tensors)


def _adopt_starts(expression: Weight, tensors: Mapping[str, Tensor]) -> None:
    """Let starts that are subtracted take their ranks, which the product may have left behind."""
    for leaf in expression.leaves():
        value = tensors.get(leaf.name)
        if not isinstance(leaf, Dense) or not leaf.name.endswith(".start") or value is None:
            continue
        axis = 1 if leaf.name.removesuffix(".start").endswith("up") else 0
        if value.dim() == len(leaf.shape) == 2 and value.shape[1 - axis] == leaf.shape[1 - axis]:
            leaf.resize(torch.empty_like(value))


def owned(expression: Weight) -> dict[str, tuple[Any, str]]:
    """Map every stored leaf name of an expression to the module and attribute that hold its tensor."""
    found: dict[str, tuple[Any, str]] = {}
    for leaf in expression.leaves():
        if isinstance(leaf, Dense | Moved):
            if leaf.name in found:
                raise ValueError(f"two leaves are called {leaf.name!r} in {expression.formula()}")
            found[leaf.name] = leaf.transfer()
    return found
