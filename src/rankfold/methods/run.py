"""The training under way, as dynamics and dynamic rank rules see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers import Adaptation
from ..optim import resize as resize_state
from ..weights import Dense, Leaf, Moved, Pair, Weight
from .site import derived_seed

MEMORY = "rankfold"  # the key of a parameter group under which everything lives that a checkpoint needs


@dataclass(frozen=True)
class TrainedPair:
    """A trained product `scale * up @ diag(gate) @ down` somewhere in a model.

    Attributes:
        path: of the layer.
        pair: the leaves.
        expression: of the layer.
        base: the stored weight as a leaf that changes can be moved into, or None.
    """

    path: str
    pair: Pair
    expression: Weight
    base: Moved | None

    @property
    def key(self) -> str:
        """A name for it, unique in the model."""
        return f"{self.path}:{self.pair.up.name}"

    @property
    def up(self) -> nn.Parameter:
        """B, (out, r)."""
        return _parameter(self.pair.up)

    @property
    def down(self) -> nn.Parameter:
        """A, (r, in)."""
        return _parameter(self.pair.down)

    @property
    def gate(self) -> Tensor | None:
        """The gate's values (r,), or None; a Parameter where the gate is a trained leaf of its own."""
        return None if self.pair.gate is None else self.pair.gate.tensor()

    @property
    def scale(self) -> float:
        """The constant before the product."""
        return self.pair.scale

    @property
    def rank(self) -> int:
        """Number of terms."""
        return int(self.up.shape[1])

    @torch.no_grad()
    def change(self) -> Tensor:
        """Return the whole product (out, in), in the factors' dtype."""
        up = self.up if self.gate is None else self.up * self.gate
        return self.scale * (up @ self.down)

    @torch.no_grad()
    def move_into_base(self, change: Tensor | None = None) -> None:
        """Add a change (out, in), by default the whole product, to the stored weight.

        The model's function stays what it is if the factors are changed by as much.
        """
        assert self.base is not None
        self.base.move(self.change() if change is None else change)


def _parameter(leaf: Leaf) -> nn.Parameter:
    assert isinstance(leaf, Dense)
    assert isinstance(leaf.value, nn.Parameter)
    return leaf.value


class Run:
    """A training run: the model's trained products, the optimizer, the clock and what is remembered.

    Attributes:
        model: the adapted model.
        optimizer: that steps.
        adapter: that is trained.
        expressions: of the adapter, by path.
        total_steps: of the whole training, or None.
        asked_rank: the rank that `adapt` was asked for, which a rank rule shares out.
        scheduler, validation, loss: as given to `attach`, or None.
    """

    def __init__(
        self,
        adaptation: Adaptation,
        name: str,
        optimizer: Optimizer,
        *,
        total_steps: int | None = None,
        scheduler: Any = None,
        validation: Any = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer, self.adaptation, self.name = adaptation.root, optimizer, adaptation, name
        self.total_steps, self.scheduler = total_steps, scheduler
        self.validation, self.loss = validation, loss
        self.adapter = adaptation.adapter(name)
        self.seed = int(self.adapter.record["seed"])
        self.asked_rank: int | None = self.adapter.record.get("rank")
        self.expressions = adaptation.expressions(name)
        self._all_pairs = [
            pair for path in self.expressions for pair in _pairs_of(path, self.expressions[path])
        ]
        self._scope = ""
        self._rates: list[tuple[dict[str, Any], float]] = []

    @property
    def removed(self) -> bool:
        """Whether the adapter is no longer in the model."""
        return self.adaptation.adapters.get(self.name) is not self.adapter

    @property
    def pairs(self) -> list[TrainedPair]:
        """Every trained product, in the model's order; to a rank rule with gates, those that have one."""
        gated = [pair for pair in self._all_pairs if pair.pair.gate is not None]
        return gated if gated and self._scope.startswith("ranks=") else self._all_pairs

    # What is remembered ---------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint needs; it is part of `optimizer.state_dict()`."""
        stored: dict[str, Any] = self.optimizer.param_groups[0].setdefault(
            MEMORY, {"clock": 0, "begun": False, "point": "", "memory": {}}
        )
        return stored

    @property
    def step(self) -> int:
        """How many steps the optimizer has taken; one that a gradient scaler skipped is not counted."""
        return int(self.state["clock"])

    def memory(self, key: str = "", scope: str | None = None) -> dict[str, Any]:
        """Return what the method under way remembers under a key: a dict of tensors and numbers, kept.

        Args:
            key: of the method's own choice.
            scope: of the method, where another one may be under way, as in a hook.
        """
        scope = self._scope if scope is None else scope
        found: dict[str, Any] = self.state["memory"].setdefault(scope, {}).setdefault(key, {})
        return found

    @property
    def scope(self) -> str:
        """The name under which the method under way is known."""
        return self._scope

    def enter(self, scope: str) -> None:
        """Let `memory` and `generator` be those of a method from now on."""
        self._scope = scope

    def generator(self, *names: str) -> torch.Generator:
        """Return a CPU generator seeded by the adapter's seed, the method, the step and names."""
        seed = derived_seed(self.seed, self._scope, str(self.step), *names)
        return torch.Generator().manual_seed(seed)

    # Learning rates ---------------------------------------------------------------------------------------

    def group(self, parameter: Tensor) -> dict[str, Any]:
        """Return the parameter group that holds a parameter."""
        return next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))

    def scale_rates(self, factor: float) -> None:
        """Multiply every learning rate for the step that is about to be taken only."""
        for group in self.optimizer.param_groups:
            self._rates.append((group, group["lr"]))
            group["lr"] = group["lr"] * factor

    def restore_rates(self) -> None:
        """Put the learning rates back that `scale_rates` changed."""
        for group, rate in reversed(self._rates):
            group["lr"] = rate
        self._rates.clear()

    # Changes of rank --------------------------------------------------------------------------------------

    @torch.no_grad()
    def resize(
        self,
        pair: TrainedPair,
        keep: Tensor,
        up: Tensor | None = None,
        down: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> None:
        """Keep some terms of a product and add fresh ones after them; the optimizer's state follows.

        Kept terms keep their moments, fresh ones start with none. The model's function is unchanged if the
        terms that go, and the fresh ones, are zero.

        Args:
            pair: the product.
            keep: positions of the terms that stay.
            up: fresh columns (out, k), or None.
            down: fresh rows (k, in).
            gate: fresh gates (k,), where the product has a gate.
        """
        added = 0 if up is None else up.shape[1]
        tensors = [(pair.up, 1, up), (pair.down, 0, down)]
        old_gate = pair.gate
        if isinstance(old_gate, nn.Parameter):
            tensors.append((old_gate, 0, gate))
        values = []
        for tensor, axis, fresh in tensors:
            resize_state(self.optimizer, tensor, axis, keep, added)
            kept = tensor.detach().index_select(axis, keep.to(tensor.device))
            values.append(kept if fresh is None else torch.cat([kept, fresh.to(kept)], axis))
        if old_gate is not None and len(values) == 2:
            kept = old_gate.detach()[keep.to(old_gate.device)]
            values.append(kept if gate is None else torch.cat([kept, gate.to(kept)]))
        pair.pair.owner.resize(*values)


def _pairs_of(path: str, expression: Weight) -> list[TrainedPair]:
    base = next((leaf for leaf in expression.leaves() if isinstance(leaf, Moved)), None)
    return [TrainedPair(path, pair, expression, base) for pair in expression.pairs()]
