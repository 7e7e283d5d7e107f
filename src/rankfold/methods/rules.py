"""What rank rules and dynamics are written against.

A static rank rule sees the weights once, before anything is built (`Unit`). A dynamics acts around every step
of the optimizer (`Dynamics`), and a dynamic rank rule is a dynamics that has put gates into the trained
products (`DynamicRanks`). Both see the training under way through a `Run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..weights import Leaf, Weight

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .run import Run
    from .site import Place, Site


@dataclass(frozen=True)
class Unit:
    """A weight that takes part in sharing out a budget of ranks; layers tied to it are in it.

    Attributes:
        path: dotted name of the module.
        shape: (out, in).
        depth: index of its block in the model, from 0.
        blocks: how many blocks the model has.
        limit: the most that the structure can hold in it, or None.
        multiple: what its rank has to be a multiple of.
        site: the weight itself: `site.matrix()`, `site.statistic(...)`.
    """

    path: str
    shape: tuple[int, int]
    depth: int = 0
    blocks: int = 1
    limit: int | None = None
    multiple: int = 1
    site: Any = field(default=None, compare=False)

    @property
    def cost(self) -> int:
        """Numbers that one rank takes: out + in."""
        return sum(self.shape)

    def fitted(self, rank: float, least: int = 1) -> int:
        """Return the nearest rank that the weight can hold, at least `least` (0 leaves the weight out)."""
        multiple = self.multiple
        most = self.limit // multiple if self.limit is not None else round(rank) + 1
        steps = min(max(round(rank / multiple), -(-least // multiple)), most)
        return max(steps, 0) * multiple


class Dynamics:
    """How parameters move: what happens around every step of the optimizer.

    Derive a dataclass of keyword-only fields, its options, and register it with `@dynamics`. All state lives
    in `run.memory(...)`, which is part of `optimizer.state_dict()`, never on the object.
    An attribute `needs` names which of total_steps, scheduler, validation and loss `attach` has to be given.
    """

    @property
    def idle(self) -> bool:
        """Whether its options leave it nothing to do, so that a structure's training need not be attached."""
        return False

    def rate(self, side: str, leaf: Leaf, expression: Weight) -> float:
        """Return what the learning rate of a leaf is multiplied by; side is output, input or ""."""
        return 1.0

    def wrapped(self, site: Site, expression: Weight) -> Weight:
        """Return the expression that training begins with, around the one that the structure has built."""
        return expression

    def suits(self, path: str, expression: Weight) -> None:
        """Refuse a weight to which the method has no meaning; called by `adapt` and again by `attach`."""

    def check(self, run: Run) -> None:
        """Refuse what this training cannot give; called by `attach`, also when training resumes."""

    def watch(self, run: Run) -> Sequence[RemovableHandle]:
        """Put hooks on the model, which go with the handle; called by `attach`, also when training resumes.

        They store what they see in `run.memory(key, scope)`, with the scope that `run` has now.
        """
        return ()

    def begin(self, run: Run) -> None:
        """Act once, when training begins and not when it resumes."""

    def gradients_ready(self, run: Run) -> None:
        """Act before the optimizer's step, when all gradients are there."""

    def stepped(self, run: Run) -> None:
        """Act after the optimizer's step; `run.step` counts it already."""

    def finish(self, run: Run) -> None:
        """Act when the handle is removed after training."""


class DynamicRanks(Dynamics):
    """A rank rule that acts during training, on gates between the factors of every trained product.

    Attributes:
        gated: whether there are gates at all; a rule without them changes the factors themselves.
        opens: whether its gates can start at zero and be opened by training.
        on_pairs: whether it acts on trained products of two factors; a rule that does not acts on the leaves
            that meet the input, where its registration says so (`entries`).
        alpha_over: the rank that alpha is divided by: "first", the one that a weight begins with, or "asked".
    """

    gated: ClassVar[bool] = True
    opens: ClassVar[bool] = True
    on_pairs: ClassVar[bool] = True
    alpha_over: ClassVar[str] = "first"

    def share(self, units: Sequence[Unit], rank: int) -> Mapping[str, int]:
        """Return the rank that every weight begins with."""
        return {unit.path: rank for unit in units}

    def gate(self, site: Place, name: str, rank: int, start: str) -> Leaf:
        """Return the gate of a product, shape (rank,).

        Args:
            site: where it is.
            name: of the leaf.
            rank: number of terms.
            start: what the factors start from: "gated" wants a gate of zeros, "residual" and "displaced" one
                of ones, and with "zero" it must not be zero.
        """
        ones = 0.0 if start == "gated" else 1.0
        return site.trained(site.zeros(rank) + ones, name)


def soft_threshold(values: Tensor, threshold: float | Tensor) -> Tensor:
    """Return the proximal step of the l1 norm, `sign(v) max(|v| - t, 0)`, entry by entry.

    Example:
        >>> import torch
        >>> soft_threshold(torch.tensor([0.15, -0.15, 0.05]), 0.1)
        tensor([ 0.0500, -0.0500,  0.0000])
    """
    return values.sign() * (values.abs() - threshold).clamp_min(0)
