"""Gates that travel beside the input: one number per (batch, token) that multiplies a term.

A gate is computed once per forward of the root model, from its inputs, and read by the terms and branches
that it controls. Recomputation under gradient checkpointing restores the gates of the forward that it repeats
(`layers.carrier`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NotDense
from .op import LINEAR, Op
from .weight import Leaf, Pair, Weight


class Gates:
    """The gates of the forward pass under way, by key."""

    def __init__(self) -> None:
        self.current: dict[str, Tensor] = {}

    def read(self, key: str, x: Tensor) -> Tensor:
        """Return the gate for an activation x (batch, token, channels), as (batch, token, 1).

        Raises:
            NotDense: there is no gate, or it is for another number of tokens.
        """
        gate = self.current.get(key)
        if gate is None:
            raise NotDense(
                f"the gate {key!r} is not set: call the whole adapted model, not one of its layers"
            )
        if x.dim() != 3 or gate.shape != x.shape[:2]:
            raise NotDense(
                f"the gate {key!r} is for (batch, token) = {tuple(gate.shape)}, the input is {tuple(x.shape)}"
            )
        return gate[..., None].to(x.dtype)


class Gated(Weight):
    """A term that acts only where its gate is open; it has no matrix of its own."""

    def __init__(self, inner: Weight, gates: Gates, key: str) -> None:
        super().__init__(inner.shape)
        self.inner, self.gates, self.key = inner, gates, key

    def dense(self) -> Tensor:
        """Refuse.

        Raises:
            NotDense: always; the map differs from token to token.
        """
        raise NotDense(
            f"{self.formula()} differs from token to token and has no dense matrix: it cannot be folded"
        )

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply the term and multiply by the gate; closed tokens get exactly zero."""
        gate = self.gates.read(self.key, x)
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
        return f"gate[{self.key}] ({self.inner.formula()})"
