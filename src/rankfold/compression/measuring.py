"""Letting weights have other values for a while, and measuring what the model's output suffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..formats.files import read_tensors
from ..layers import StructuredTransposedLinear
from ..statistics.batches import loss_of, prepared
from ..statistics.calibrating import calibrating
from ..statistics.watched import Watched
from .distortion import output_of
from .ledger import write_kept
from .objective import Solved
from .task import Task


class Undo:
    """Within the block changes are noted; at its end they are undone, the last first.

    Args:
        folder: where what was there before is kept until then; None keeps it in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._steps: list[Callable[[], object]] = []

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            while self._steps:
                self._steps.pop()()
        for file in self._folder.glob("before-*.safetensors") if self._folder is not None else ():
            file.unlink()

    def assign(self, tensor: Tensor, value: Tensor) -> None:
        """Let a tensor have other values."""
        before = self._kept(tensor)
        self._steps.append(lambda: tensor.copy_(before()))
        tensor.copy_(value)

    def _kept(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Return what gives back what a tensor holds now."""
        if self._folder is None:
            before = tensor.clone()
            return lambda: before
        file = self._folder / f"before-{len(self._steps)}.safetensors"
        write_kept(file, {"before": tensor})
        return lambda: read_tensors(file)["before"]

    def give_bias(self, weight: Watched, value: Tensor) -> None:
        """Let every module that reads a weight have a bias."""
        for use in weight.uses:
            parameters = use.layer._parameters
            self._steps.append(partial(parameters.__setitem__, "bias", None))
            parameters["bias"] = nn.Parameter(value.clone(), requires_grad=False)


def stand_in(weight: Watched, found: Solved, undo: Undo) -> None:
    """Let a weight have the values that its factors give."""
    matrix, stored = found.matrix(), weight.layer.stored().detach()
    # The layer's matrix may be a copy, as where a convolution has its channels last.
    transposed = isinstance(weight.layer, StructuredTransposedLinear)
    undo.assign(stored, matrix.T if transposed else matrix.reshape(stored.shape))
    if found.shift is None:
        return
    biases = biases_of(weight)
    if not biases:
        undo.give_bias(weight, found.shift.to(stored))
    for bias in biases:
        undo.assign(bias, bias + found.shift.to(bias))


def biases_of(weight: Watched) -> list[Tensor]:
    """Return the biases beside a weight: one, none, or several where it is tied."""
    found = [use.layer._parameters.get("bias") for use in weight.uses]
    return list({id(bias): bias.detach() for bias in found if bias is not None}.values())


class Suffered:
    """What a model's output suffers where one weight alone is cut.

    It is the loss, or without one the relative squared error of the output.

    Args:
        task: the model and the batches; labels in them give a loss.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        device = next((p.device for p in task.model.parameters()), torch.device("cpu"))
        self.batches = [prepared(i, content, device, "padding") for i, content in enumerate(task.batches())]
        self.plain: list[Tensor] | None = None

    @torch.no_grad()
    def where(self, weight: Watched, solve: Callable[[int], Solved], rank: int) -> float:
        """Measure it with one weight at a rank."""
        with calibrating(self.task.model, []):
            if self.plain is None:
                self.plain = list(self._outputs())
            with Undo() as undo:
                stand_in(weight, solve(rank), undo)
                return self._measure()

    def _measure(self) -> float:
        """Return the mean over batches, by their tokens."""
        assert self.plain is not None
        total, count = 0.0, 0
        for batch, before, after in zip(self.batches, self.plain, self._outputs(), strict=True):
            is_loss = not before.dim()
            value = after if is_loss else (after - before).square().sum() / before.square().sum()
            total += float(value) * batch.count()
            count += batch.count()
        return total / max(1, count)

    def _outputs(self) -> Iterator[Tensor]:
        """Yield the loss of every batch, a scalar, or else the model's output."""
        for batch in self.batches:
            loss = loss_of(self.task.model, batch, self.task.loss, needed=False)
            yield output_of(self.task.model, batch.content) if loss is None else loss.double()
