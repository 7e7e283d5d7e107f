"""What a method that compresses a whole model is given, and the calibration of one that goes by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
from ..layers import Targets
from ..statistics import Statistics, collect, sequentially
from ..statistics.watched import Watched
from .report import CompressionReport

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Task:
    """What is asked for.

    Attributes:
        model: changed in place.
        keep: share of the targeted weights' numbers that may remain, in (0, 1].
        targets: which weights.
        data: batches, or None.
        loss: `loss(model, batch)`, where the model's output has none.
        seed: of every random choice.
        progress: show progress.
        report: rows and notes go there.
        original: the model before an earlier compression, for methods that compensate one.
        few_tokens: "error" or "allow", see `compress`.
    """

    model: nn.Module
    keep: float
    targets: Targets
    data: Sequence[Any] | Statistics | None = None
    loss: Loss | None = None
    seed: int = 0
    progress: bool = True
    report: CompressionReport = field(default_factory=lambda: CompressionReport("", {}, 1.0))
    original: nn.Module | None = None
    few_tokens: str = "error"

    def batches(self) -> list[Any]:
        """Return the batches.

        Raises:
            InvalidOption: there are none.
        """
        if self.data is None or isinstance(self.data, Statistics):
            raise InvalidOption(f"{self.report.method} runs the model on data; pass data= with batches")
        return list(self.data)


def refuse_half_precision(model: nn.Module, method: str) -> None:
    """Refuse to train float16 parameters, in which the steps of Adam become NaN.

    Raises:
        Incompatible: naming the first of them.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16:
            raise Incompatible(
                f"{method} trains, and {name} is float16, in which Adam overflows; take bfloat16 or float32 "
                "(model.float(), on the command line --dtype float32)"
            )


def calibrated(
    task: Task, weights: Sequence[Watched], needs: Sequence[Any], *, sequential: bool, memory: float | None
) -> Iterator[tuple[list[Watched], Statistics | None]]:
    """Yield the weights in groups, each with its statistics.

    Args:
        task: what is asked for.
        weights: all of them.
        needs: statistics, as `collect` takes them; without any there is one group.
        sequential: the statistics of a group come from the model as it is when the group is asked for, behind
            the weights of all groups before it.
        memory: bytes that the statistics of one group may take; None takes all weights in one pass.
    """
    by_path = {weight.path: weight for weight in weights}
    if not needs:
        yield list(weights), None
    elif isinstance(task.data, Statistics):
        if sequential:
            raise InvalidOption(
                "sequential calibration runs the model again and again; pass data= with batches"
            )
        task.data.check(task.model)
        yield list(weights), task.data
    elif sequential:
        for paths, found in sequentially(
            task.model, task.batches(), needs, targets=list(by_path), loss=task.loss, progress=task.progress,
            seed=task.seed,
        ):  # fmt: skip
            yield [by_path[path] for path in paths], found
    else:
        for chunk in chunks(weights, memory):
            yield chunk, collect(
                task.model, task.batches(), needs, targets=[w.path for w in chunk], loss=task.loss,
                progress=task.progress, seed=task.seed,
            )  # fmt: skip


def one_by_one(data: Sequence[Any] | Statistics) -> Sequence[Any] | Statistics:
    """Return the examples of batches as batches of one; statistics are taken as they were collected.

    Raises:
        InvalidOption: a batch holds no tensor with an axis of examples.
    """
    if isinstance(data, Statistics):
        return data
    return [
        _example(batch, index, size) for batch in data for size in [_size(batch)] for index in range(size)
    ]


def _size(batch: Any) -> int:
    """Return the number of examples: the length of the first tensor."""
    found = next((tensor for tensor in tensors_of(batch) if tensor.dim()), None)
    if found is None:
        raise InvalidOption(
            "gradients of single examples need batches of tensors whose first axis is that of the examples; "
            "pass per_sample=False and batches of one example"
        )
    return len(found)


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors in a batch, or in other nested data."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for entry in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(entry)


def _example(value: Any, index: int, size: int) -> Any:
    """Cut a batch, its tensors with an axis of the examples, to one."""
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.dim() and len(value) == size else value
    if isinstance(value, Mapping):
        return {key: _example(entry, index, size) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_example(entry, index, size) for entry in value))
    if isinstance(value, list | tuple):
        return type(value)(_example(entry, index, size) for entry in value)
    return value


def chunks(weights: Iterable[Watched], memory: float | None) -> Iterator[list[Watched]]:
    """Yield weights in groups whose Gram matrices of their inputs, in float64, take at most so many bytes."""
    chunk, used = list[Watched](), 0.0
    for weight in weights:
        size = 8.0 * weight.layer.shape[1] ** 2
        if chunk and memory is not None and used + size > memory:
            yield chunk
            chunk, used = [], 0.0
        chunk.append(weight)
        used += size
    if chunk:
        yield chunk


def require_tokens(task: Task, path: str, inputs: int, tokens: int) -> None:
    """Refuse calibration data in which a weight met fewer tokens than it has inputs, unless that is allowed.

    Raises:
        InvalidOption: saying how many there are and how many are wanted.
    """
    if tokens < inputs and task.few_tokens == "error":
        raise InvalidOption(
            f"{path}: the calibration data have {tokens} tokens, and its {inputs} inputs want at least as "
            "many; give more data, or pass few_tokens='allow'"
        )
