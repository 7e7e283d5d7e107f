"""How much the change of every adapted weight matters, read off while gradients flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers import StructuredLayer
from .run import Run


class ChangeSensitivity:
    """Adds up `sum |dW . dL/dW|` of every adapted weight, dW = W - W0, one backward after the other.

    A weight's dense gradient (out, in) is formed from the layer's input and the gradient of its output,
    reduced to one number at once, and let go. Where a layer is called or backward is run several times,
    absolute values are added up. Layers that are no modules of their own, such as the projections inside
    `nn.MultiheadAttention`, and changes that differ from token to token are not seen.

    Attributes:
        handles: of the hooks on the layers.
    """

    def __init__(self, run: Run) -> None:
        self._sums: dict[str, Tensor] = {}
        self.handles = watch_gradients(run, self._add)

    def _add(self, path: str, layer: StructuredLayer, x: Tensor, gradient: Tensor) -> None:
        self._sums[path] = self._sums.get(path, 0.0) + _sensitivity(layer, x, gradient)

    def take(self) -> dict[str, Tensor] | None:
        """Return the sums since the last call by path; None if one is not finite, as after a skipped step."""
        taken = dict(self._sums)
        self._sums.clear()
        return taken if all(bool(torch.isfinite(value)) for value in taken.values()) else None


Arrived = Callable[[str, StructuredLayer, Tensor, Tensor], None]


def watch_gradients(
    run: Run, arrived: Arrived, wanted: Callable[[str], bool] = lambda path: True
) -> list[RemovableHandle]:
    """Put hooks on the adapted layers that hand on the inputs and the gradients of the outputs.

    Args:
        run: the training.
        arrived: called with path, layer, input and the gradient of the output; `weight_gradient` takes those.
        wanted: asked in every forward; an input is held until backward only where it says so.
    """
    whole = [path for path, expression in run.expressions.items() if expression.has_matrix()]
    owners = {id(run.adaptation.layers[path]): path for path in whole}
    return [
        layer.register_forward_hook(_forward_hook(owners[id(owner)], arrived, wanted), with_kwargs=True)
        for layer in run.adaptation.layers.values()
        if id(owner := layer.lender or layer) in owners
    ]


def _forward_hook(path: str, arrived: Arrived, wanted: Callable[[str], bool]) -> Callable[..., None]:
    def called(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(module, StructuredLayer) or module.expression is None:
            return
        if not isinstance(output, Tensor) or not output.requires_grad or not wanted(path):
            return
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        output.register_hook(lambda gradient: arrived(path, module, x, gradient))

    return called


@torch.no_grad()
def _sensitivity(layer: StructuredLayer, x: Tensor, gradient: Tensor) -> Tensor:
    assert layer.expression is not None
    change = layer.expression.dense()
    change = change if layer.is_released else change - layer.matrix()
    return (change * weight_gradient(layer, x, gradient)).abs().sum()


def weight_gradient(layer: StructuredLayer, x: Tensor, gradient: Tensor) -> Tensor:
    """Return dL/dW (out, in) of a layer from an input and the gradient of its output."""
    with torch.enable_grad():
        probe = torch.zeros(layer.shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
        if layer.looked_up:  # as in the plain layer, the padding row has no gradient
            y = F.embedding(x, probe, layer.padding_idx)
        else:
            y = layer.op.apply(x.to(probe.dtype), probe)
        return torch.autograd.grad(y, probe, gradient)[0]
