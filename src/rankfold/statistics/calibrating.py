"""Putting a model into the state of a calibration pass, and back, whatever happens."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..layers import StructuredLayer


@contextlib.contextmanager
def calibrating(model: nn.Module, trained: Iterable[Tensor]) -> Iterator[None]:
    """Let a model be in evaluation mode, with gradients of `trained` alone, until the block ends.

    Modes, `requires_grad` flags and gradients are restored. Layers of bitsandbytes keep their mode: their
    evaluation mode packs the stored weight anew.
    """
    modes = {module: module.training for module in _modules(model)}
    parameters = list(model.parameters())
    flags, gradients = [p.requires_grad for p in parameters], [p.grad for p in parameters]
    try:
        for module in modes:
            module.training = module.training and _packs(module)
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        for tensor in trained:
            tensor.requires_grad_(True)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag, gradient in zip(parameters, flags, gradients, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module, and those that adapted layers call without having them registered."""
    for module in model.modules():
        yield module
        if isinstance(module, StructuredLayer):
            yield from module.original.modules()


def _packs(module: nn.Module) -> bool:
    return type(module._parameters.get("weight")).__name__ == "Params4bit"


@contextlib.contextmanager
def hooks() -> Iterator[list[Any]]:
    """Yield a list of handles that are removed when the block ends."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Hold an interrupt from the keyboard back until the block ends, so that no batch is half counted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    try:
        usual = signal.signal(signal.SIGINT, lambda number, frame: held.append(number)) or signal.SIG_DFL
    except ValueError:  # not the main interpreter
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if held:
        signal.raise_signal(signal.SIGINT)


class Progress:
    """A progress bar on the standard error stream, where that is a terminal and tqdm is installed."""

    def __init__(self, shown: bool, total: int | None, text: str = "collecting") -> None:
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm

                self.bar = tqdm(total=total, desc=text, unit=" batches")

    def step(self) -> None:
        """Advance by one batch."""
        if self.bar is not None:
            self.bar.update(1)

    def close(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
