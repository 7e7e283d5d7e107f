"""Whole weights that take turns: the inner optimizer moves some, their gradients' signs the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidOption
from .matrices import Layout, Work, named
from .projected import ProjectedOptimizer
from .seeds import hashed

_STAYS = ("step", "inner_step", "shape", "master")


class BlockOptimizer(ProjectedOptimizer):
    """Keeps moments for a share of the weights at a time; `frugal(projector="blocks")` makes it.

    Every `refresh` steps the next ones take their turn, in an order that is drawn anew when all had theirs.
    Moments start at zero with every turn, and nothing is kept of a weight that waits.

    Args:
        params: groups; those with `turns=True` take turns.
        lr: learning rate.
        density: share of their weights that have moments at a time, in [0, 1].
        sign: lambda, what signs are multiplied by.
        options: further ones of `ProjectedOptimizer`.
    """

    def __init__(self, params: Any, lr: float, *, density: float, sign: float, **options: Any) -> None:
        self.density, self.sign = density, sign
        self.names: list[str] = []  # of weights that take turns
        super().__init__(params, lr, rank=None, **options)

    def _admit(self, index: int, group: dict[str, Any]) -> None:
        super()._admit(index, group)
        names = self.names + [name for name, _ in named(index, group) if group.get("turns")]
        if len(set(names)) < len(names):
            raise InvalidOption("weights that take turns need names that differ")
        self.names = names

    def _parts(self) -> str:
        return f"{super()._parts()}, density={self.density}, sign={self.sign}"

    def has_turn(self, name: str, step: int, refresh: int) -> bool:
        """Tell whether a weight has moments in a step, counted from 0."""
        if not self.density:
            return False
        count = max(1, round(self.density * len(self.names)))
        turns = -(-len(self.names) // count)
        round_, turn = divmod(step // refresh, turns)
        drawn = torch.Generator().manual_seed(hashed(self.seed, "turns", round_))
        order = torch.randperm(len(self.names), generator=drawn).tolist()
        return order.index(self.names.index(name)) // count == turn

    def _move(self, work: Work, layout: Layout, low: Tensor | None, factor: Tensor | None) -> None:
        if not work.group.get("turns"):
            super()._move(work, layout, low, factor)
            return
        kept, refresh = self._begun(work), work.group["refresh"]
        step = int(kept["step"])
        if step % refresh == 0:
            for key in [key for key in kept if key not in _STAYS]:
                del kept[key]
            kept["inner_step"].zero_()
        if self.has_turn(work.name, step, refresh):
            super()._move(work, layout, low, factor)
            return
        state = layout.opened(kept)
        state["step"] += 1
        base, target = layout.begin(work.group, state)
        target.sub_(layout.gradient(work.gradient).sign(), alpha=work.group["lr"] * self.sign)
        layout.end(work, state, base, target)
        layout.close(kept, state)
