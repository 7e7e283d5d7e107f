"""Low-rank experts side by side, each multiplied by its own gate for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NotDense
from .gates import Gates
from .op import LINEAR, Op
from .weight import Leaf, Weight


class Experts(Weight):
    """A mixture of low-rank maps, `y = sum_e g_e B_e A_e x` with gates g that differ from token to token.

    The factors of all experts stand side by side, so that they are two products however many there are.

    Args:
        up: leaf (out, E r), the experts' B_e side by side.
        down: leaf (E r, in), their A_e one below the other; or (r, in), one A for all.
        choose: what gives the gates.
    """

    by_token = True

    def __init__(self, up: Leaf, down: Leaf, choose: Chooser) -> None:
        super().__init__((up.shape[0], down.shape[1]))
        self.up, self.down = up, down
        self.choose = choose  # a router is a module and so registered here

    def dense(self) -> Tensor:
        """Refuse.

        Raises:
            NotDense: always; the map differs from token to token.
        """
        raise NotDense(
            f"{self.formula()} differs from token to token and has no dense matrix: it cannot be folded"
        )

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Apply every expert and add the results, each multiplied by its gate."""
        gates = self.choose.gates_for(x)
        inner = F.linear(x, self.down.tensor().to(x.dtype))
        if gates.shape[-1] == 1:  # one gate for all
            return op.add(F.linear(gates * inner, self.up.tensor().to(x.dtype)), bias)
        shared = self.up.shape[1] != self.down.shape[0]
        inner = inner.unsqueeze(-2) if shared else inner.unflatten(-1, (gates.shape[-1], -1))
        return op.add(F.linear((gates[..., None] * inner).flatten(-2), self.up.tensor().to(x.dtype)), bias)

    map = forward

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield both factors, where they are trained."""
        yield from (
            (leaf, side) for leaf, side in ((self.up, "output"), (self.down, "input")) if leaf.trainable
        )

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield A, where it is trained."""
        if self.down.trainable:
            yield self.down, 1

    def macs(self, tokens: int) -> int:
        """Return those of the two products."""
        return tokens * (self.up.shape[0] * self.up.shape[1] + self.down.shape[0] * self.down.shape[1])

    def formula(self) -> str:
        """Return the product with the gates between its factors."""
        return f"{self.up.formula()} @ diag({self.choose.name_of_gates()}) @ {self.down.formula()}"


class Chooser(Protocol):
    """Gives the gates of experts for what a layer reads."""

    def gates_for(self, x: Tensor) -> Tensor:
        """Return gates (batch, ..., expert) for x (batch, ..., in)."""

    def name_of_gates(self) -> str:
        """Return what a formula calls them."""


class Given:
    """Gates that a rule of the model has computed.

    Args:
        gates: of the model.
        key: of the gate.
        first, count: which of the gate's experts; all by default.
    """

    def __init__(self, gates: Gates, key: str, first: int = 0, count: int | None = None) -> None:
        self.gates, self.key = gates, key
        self.chosen = slice(first, None if count is None else first + count)

    def gates_for(self, x: Tensor) -> Tensor:
        """Return the gates of these experts."""
        values = self.gates.read(self.key, x)
        return values if values.shape[-1] == 1 else values[..., self.chosen]

    def name_of_gates(self) -> str:
        """Return the key."""
        return f"gate[{self.key}]"


class Same:
    """The gates of a router that is registered elsewhere in the expression."""

    def __init__(self, router: Router) -> None:
        self._router = (router,)

    def gates_for(self, x: Tensor) -> Tensor:
        """Return the router's gates."""
        return self._router[0].gates_for(x)

    def name_of_gates(self) -> str:
        """Return what the router's are called."""
        return self._router[0].name_of_gates()


Policy = Callable[["Router", Tensor], Tensor]


class Router(Weight):
    """A layer's own router, `logits = R x`, and the policy that makes gates of it.

    Args:
        matrix: leaf R (E, in).
        gates: of the model.
        key: of the gate that says which tokens count: (batch, token), 0 for padding.
        name: of the layer.
        policy: `policy(router, x)` returns gates (batch, token or 1, expert).
    """

    def __init__(self, matrix: Leaf, gates: Gates, key: str, name: str, policy: Policy) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]))
        self.matrix, self.gates, self.key, self.layer_name, self.policy = matrix, gates, key, name, policy

    @property
    def place(self) -> str:
        """What the router leaves and remembers goes by, unique in the model: layer and adapter."""
        return f"{self.layer_name} ({self.key})"

    def dense(self) -> Tensor:
        """Return R, (E, in)."""
        return self.matrix.dense()

    def counted(self, x: Tensor) -> Tensor:
        """Return which tokens of x (batch, ..., in) count, (batch, ...), as 0 and 1."""
        values = self.gates.gate(self.key).at(x)
        ones = torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)
        return ones if values is None else ones * (values[..., 0] != 0)

    def logits(self, x: Tensor) -> Tensor:
        """Return R x in float32 or better, (batch, ..., E)."""
        matrix = self.matrix.tensor()
        return F.linear(x.to(matrix.dtype), matrix)

    def gates_for(self, x: Tensor) -> Tensor:
        """Return the policy's gates, in the dtype of x."""
        return self.policy(self, x).to(x.dtype)

    def name_of_gates(self) -> str:
        """Return policy and router."""
        return f"{type(self.policy).__name__.lower()}({self.matrix.formula()} x)"

    def formula(self) -> str:
        """Return the router's matrix."""
        return self.matrix.formula()
