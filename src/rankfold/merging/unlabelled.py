"""Unlabelled data for rules of merging that run the model: streams of batches, and the entropy on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import Incompatible, InvalidOption
from ..statistics.batches import Batch, check_batches, prepared


def task_streams(data: Any, tasks: int, device: torch.device) -> list[Iterator[Batch]]:
    """Return an endless stream of batches for every task.

    Args:
        data: batches for all tasks: a list or loader of tensors, mappings or tuples. Or for each task its
            own: a list of lists or loaders, or a mapping of them by tasks' names, in the order of the models.
        tasks: how many there are.
        device: where the model is.

    Raises:
        Incompatible: there is no data.
        InvalidOption: it is one batch, or there are streams for another number of tasks. While it is read:
            a stream has no batch, or none on its second pass.

    Example:
        >>> first, second = task_streams([[torch.zeros(1)], [torch.ones(1)]], 2, torch.device("cpu"))
        >>> next(second).content
        tensor([1.])
    """
    if data is None:
        raise Incompatible("this method learns from unlabelled batches: pass data= to rf.merge")
    own = _own(data)
    if own is None:
        own = {f"task {number}": data for number in range(1, tasks + 1)}
    if len(own) != tasks:
        raise InvalidOption(f"data has batches for {len(own)} tasks, and {tasks} models are merged")
    for batches in own.values():
        check_batches(batches)
    return [_endless(batches, str(name), device) for name, batches in own.items()]


def entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean entropy, in nats, of softmax(logits) over the last axis.

    Args:
        logits: (..., classes).
        mask: true where a token counts, used where the logits are (batch, tokens, classes).

    Example:
        >>> entropy(torch.zeros(4, 8))
        tensor(2.0794)
    """
    logarithms = logits.log_softmax(-1)
    each = -(logarithms.exp() * logarithms).sum(-1)
    return (each[mask] if mask is not None and mask.shape == each.shape else each).mean()


def logits_of(model: nn.Module, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Return the logits (batch, ..., classes) of a model some of whose tensors are replaced.

    Args:
        model: any module.
        tensors: by name, all of one precision; gradients flow into them.
        batch: its arguments, brought to that precision; of a mapping, labels are left out.

    Raises:
        Incompatible: the model gives no logits.
    """
    output = _output(model, tensors, batch.content)
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.dim() < 2:
        raise Incompatible(
            f"{type(model).__name__} gives no logits (batch, ..., classes), neither as a tensor nor under "
            "that name, and the entropy is that of its predictions"
        )
    return found


def _output(model: nn.Module, tensors: Mapping[str, Tensor], content: Any) -> Any:
    precision = next(iter(tensors.values())).dtype
    if isinstance(content, Mapping):
        named = {key: _precise(value, precision) for key, value in content.items() if key != "labels"}
        return functional_call(model, dict(tensors), (), named)
    arguments = content if isinstance(content, tuple | list) else (content,)
    return functional_call(model, dict(tensors), tuple(_precise(value, precision) for value in arguments))


def _precise(value: Any, precision: torch.dtype) -> Any:
    """Return an input in the precision of the tensors that it meets."""
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(precision) if is_real else value


def _own(data: Any) -> Mapping[Any, Any] | None:
    """Return the batches of each task, or None where all share them."""
    if isinstance(data, Mapping):
        return None if any(isinstance(entry, Tensor) for entry in data.values()) else data
    if isinstance(data, Sequence) and data and not any(map(_is_batch, data)):
        return {f"task {number}": entry for number, entry in enumerate(data, start=1)}
    return None


def _is_batch(entry: Any) -> bool:
    return isinstance(entry, Tensor | Mapping | tuple) or not isinstance(entry, Iterable)


def _endless(batches: Iterable[Any], name: str, device: torch.device) -> Iterator[Batch]:
    for seen in itertools.count():
        place = -1
        for place, content in enumerate(batches):
            yield prepared(place, content, device, "padding")
        if place < 0:
            again = " on the second pass; give a list or a loader, not a generator" if seen else ""
            raise InvalidOption(f"the data of {name} has no batch{again}")
