"""Finding layers whose weight is read without the layer being called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedLayer
from .layer import StructuredLayer


class FirstForward:
    """Collects the layers that are called until the first forward of the root model ends."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting
        self.handles: list[Any] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the watch after the root's forward."""
        if torch.compiler.is_compiling():
            return
        self.end()
        if self.waiting:
            path = sorted(self.waiting)[0]
            others = f" and {len(self.waiting) - 1} more" if len(self.waiting) > 1 else ""
            raise UnsupportedLayer(
                f"{path}{others} was adapted but not called in the first forward, so its change had no "
                "effect; leave it out of targets, or pass uncalled='allow' if it is only called sometimes"
            )

    def end(self) -> None:
        """Watch no longer."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class _Called:
    """Notes that one layer is called."""

    def __init__(self, watch: FirstForward, path: str) -> None:
        self.watch, self.path = watch, path

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Strike the layer off the list."""
        if not torch.compiler.is_compiling():
            self.watch.waiting.discard(self.path)


def watch_first_forward(model: nn.Module, layers: Mapping[str, StructuredLayer]) -> FirstForward:
    """Raise in the first forward of a model that leaves one of these layers uncalled.

    Raises:
        UnsupportedLayer: in that forward, naming the layer.
    """
    called = {id(layer): path for path, layer in layers.items() if not layer.materialised}
    watch = FirstForward(set(called.values()))
    for layer in [m for m in model.modules() if isinstance(m, StructuredLayer)]:
        path = called.get(
            id(layer.lender or layer)
        )  # a call of a tied layer counts for the one it is tied to
        if path is not None:
            watch.handles.append(layer.register_forward_pre_hook(_Called(watch, path)))
    watch.handles.append(model.register_forward_hook(watch))
    return watch
