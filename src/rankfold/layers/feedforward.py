"""Gated feed-forward blocks, `down(act(gate x) * up x)`, recognised by the usual names of their parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer import StructuredLayer

# Gate, up and down projection, as transformers' models and the original code of LLaMA and T5 name them.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
WIDTHS = ("intermediate_size", "d_ff")  # what configurations call the number of hidden units


@dataclass(frozen=True)
class GatedBlock:
    """The parts of a gated feed-forward block.

    Attributes:
        module: the block.
        names: of the gate, up and down projection in it.
        activation: name of the gate's function in it.
    """

    module: nn.Module
    names: tuple[str, str, str]
    activation: str

    def projections(self) -> list[nn.Linear]:
        """Return the gate, up and down projection, under whatever adapts them."""
        parts: list[Any] = [getattr(self.module, name) for name in self.names]
        plain: list[Any] = [part.original if isinstance(part, StructuredLayer) else part for part in parts]
        return plain

    @property
    def width(self) -> int:
        """How many hidden units the block has."""
        return self.projections()[0].out_features

    def widen(self, units: list[tuple[Tensor, Tensor | None]]) -> None:
        """Append hidden units in place.

        Args:
            units: weight and bias of the gate (n, d) and (n,), of up alike, and of down (d, n), None.
        """
        for projection, (weight, bias), dim in zip(self.projections(), units, (0, 0, 1), strict=True):
            projection.weight = _joined(projection.weight, weight, dim)
            if bias is not None:
                projection.bias = _joined(projection.bias, bias, 0)
            projection.out_features, projection.in_features = projection.weight.shape
        for name in WIDTHS:
            if isinstance(getattr(self.module, name, None), int):
                setattr(self.module, name, self.width)


def _joined(stored: Tensor, more: Tensor, dim: int) -> nn.Parameter:
    value = torch.cat([stored.detach(), more.detach().to(stored.device, stored.dtype)], dim)
    return nn.Parameter(value, requires_grad=stored.requires_grad)


def gated_block(module: nn.Module) -> GatedBlock | None:
    """Return the parts of a gated feed-forward block, or None where a module is none.

    A module with other children than the three linear projections, an activation and dropout is none: its
    hidden units would not be `act(gate x) * up x`.
    """
    children = {n: c for n, c in module.named_children() if not n.startswith("rankfold_")}
    names = next((names for names in _NAMES if set(names) <= set(children)), None)
    act = next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)
    if names is None or act is None:
        return None
    block = GatedBlock(module, names, act)
    others = [child for name, child in children.items() if name not in (*names, act)]
    plain = all(type(projection) is nn.Linear for projection in block.projections())
    return block if plain and all(isinstance(other, nn.Dropout) for other in others) else None
