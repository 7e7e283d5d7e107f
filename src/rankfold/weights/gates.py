"""Gates that travel beside the input: numbers per (batch, token, expert) that multiply a term.

A gate is computed once per forward of the root model, from its inputs, or by a router from what a layer
reads. The terms and branches that it controls read it from one `Gates`, which the model's adapters share.
Recomputation under gradient checkpointing restores the gates of the forward that it repeats
(`layers.carrier`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NotDense
from .op import LINEAR, Op
from .weight import Leaf, Pair, Weight


@dataclass(frozen=True)
class Gate:
    """The values of one gate in one forward.

    Attributes:
        values: (batch, token, expert); a batch or token axis of length 1 serves all rows or tokens.
        image: (height, width) where tokens are the points of an image; layers that read the image at another
            size of the same shape get the gate resized.
        opened: the experts that are open somewhere, where the rule knows; the others are not computed.
    """

    values: Tensor
    image: tuple[int, int] | None = None
    opened: frozenset[int] | None = None

    def at(self, x: Tensor) -> Tensor | None:
        """Return the values for an activation x (batch, ..., channels), or None where they do not fit it."""
        values = self.values
        if self.image is not None and x.dim() == 3 and x.shape[1] != values.shape[1]:
            values = self._resized(x.shape[1])
        rows = values.shape[0] in (1, x.shape[0])
        if rows and values.shape[1] == 1:
            return values.reshape(values.shape[0], *[1] * (x.dim() - 2), values.shape[2])
        return values if rows and x.dim() == 3 and values.shape[1] == x.shape[1] else None

    def _resized(self, tokens: int) -> Tensor:
        assert self.image is not None
        height, width = self.image
        rows = round((tokens * height / width) ** 0.5)
        if rows == 0 or tokens % rows or rows * width != tokens // rows * height:
            return self.values
        image = self.values.float().transpose(1, 2).unflatten(2, (height, width))
        resized = F.interpolate(image, (rows, tokens // rows), mode="nearest")
        return resized.flatten(2).transpose(1, 2).to(self.values.dtype)


class Gates:
    """What travels beside the forward pass under way.

    Attributes:
        current: the gates by key.
        kept: what is decided once for all calls that share a key-value cache.
        past: tokens that the cache holds already.
        collected: losses that the layers of this forward leave, by layer.
        drawn: log-probabilities (batch,) of what the layers of this forward have drawn, by layer.
        recording: the forward of the whole model records gradients.
        running: it has begun and not ended.
        replaying: a checkpointed part is being computed again.
    """

    def __init__(self) -> None:
        self.current: dict[str, Gate] = {}
        self.kept: dict[str, Any] = {}
        self.past = 0
        self.collected: dict[str, Callable[[], Tensor]] = {}
        self.drawn: dict[str, Callable[[], Tensor]] = {}
        self.recording = self.replaying = self.running = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Gates:
        made = memo[id(self)] = Gates()
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {}  # what belongs to a forward is not kept in files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block the gates of the last forward can be read though it has ended."""
        before, self.running = self.running, True
        try:
            yield
        finally:
            self.running = before

    def _readable(self) -> bool:
        """Whether a forward of the whole model runs, or a part of one is computed again for its gradients."""
        if torch.compiler.is_compiling() or self.running or self.replaying:
            return True
        return bool(torch._C._current_graph_task_id() >= 0)

    def gate(self, key: str) -> Gate:
        """Return a gate.

        Raises:
            NotDense: it is not set.
        """
        gate = self.current.get(key)
        if gate is None or not self._readable():
            raise NotDense(f"the gate {key!r} is not set: call the whole adapted model, not one of its parts")
        return gate

    def read(self, key: str, x: Tensor) -> Tensor:
        """Return the gate for an activation x (batch, ..., channels), as (batch, ..., expert).

        Raises:
            NotDense: there is no gate, or it is for another number of tokens.
        """
        gate = self.gate(key)
        values = gate.at(x)
        if values is None:
            raise NotDense(
                f"the gate {key!r} is for (batch, token) = {tuple(gate.values.shape[:2])}, the input is "
                f"{tuple(x.shape)}; leave out of the targets what reads something else than the model's own "
                "sequence, such as poolers and the keys and values of cross-attention"
            )
        return values.to(x.dtype)

    def collect(self, name: str, loss: Callable[[], Tensor]) -> None:
        """Leave a loss of a layer to be asked for after the forward; nothing is left by a recomputation."""
        if not self.replaying:
            self.collected[_unused(name, self.collected)] = loss

    def draw(self, name: str, score: Callable[[], Tensor]) -> None:
        """Leave the log-probability (batch,) of what a layer has drawn; nothing by a recomputation."""
        if not self.replaying:
            self.drawn[_unused(name, self.drawn)] = score


def _unused(name: str, left: dict[str, Callable[[], Tensor]]) -> str:
    """Return a name under which nothing was left yet: a layer may be called several times in a forward."""
    called = sum(known.split("#")[0] == name for known in left) if name in left else 0
    return f"{name}#{called}" if called else name


class Gated(Weight):
    """A term that acts only where its gate is open; it has no matrix of its own.

    Args:
        inner: the term.
        gates: of the model.
        key: of its gate.
        expert: which of the gate's experts it is.
    """

    by_token = True

    def __init__(self, inner: Weight, gates: Gates, key: str, expert: int = 0) -> None:
        super().__init__(inner.shape)
        self.inner, self.gates, self.key, self.expert = inner, gates, key, expert

    def dense(self) -> Tensor:
        """Refuse.

        Raises:
            NotDense: always; the map differs from token to token.
        """
        raise NotDense(
            f"{self.formula()} differs from token to token and has no dense matrix: it cannot be folded"
        )

    @property
    def is_closed(self) -> bool:
        """Whether it is known to be closed everywhere in this forward, so that nothing is computed."""
        opened = self.gates.gate(self.key).opened
        return opened is not None and self.expert not in opened

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the term and multiply by the gate; closed tokens get exactly zero."""
        if self.is_closed:
            return op.add(x.new_zeros(*x.shape[:-1], self.shape[0]), bias)
        gate = self.gates.read(self.key, x)[..., self.expert, None]
        y = torch.where(
            gate == 0, torch.zeros((), dtype=x.dtype, device=x.device), self.inner(x, op=op) * gate
        )
        return op.add(y, bias)

    map = forward

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield the inner pairs, which change the weight for some tokens only."""
        for pair in self.inner.pairs(scale):
            yield replace(pair, additive=False)

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the inner leaves."""
        yield from self.inner.sides()

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the inner leaves."""
        yield from self.inner.entries()

    def macs(self, tokens: int) -> int:
        """Return the inner count."""
        return self.inner.macs(tokens)

    def formula(self) -> str:
        """Return the term behind its gate."""
        which = f", {self.expert}" if self.expert else ""
        return f"gate[{self.key}{which}] ({self.inner.formula()})"
