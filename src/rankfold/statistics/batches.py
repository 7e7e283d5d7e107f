"""Calling a model on a batch: its arguments, its loss, its mask, and how many label tokens it has."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import Incompatible, InvalidOption
from .finite import NotFinite

Loss = Callable[[nn.Module, Any], Tensor]
Mask = str | None | Callable[[Any], Tensor]
_IGNORED = -100  # the label of tokens that no loss counts
MASKS = ("padding", "labels")


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        index: its number among all batches of the iterable.
        content: what the iterable gave.
        mask: (batch, tokens), true where a token counts, or None where all do.
        tokens: those that count, or None where nothing says how many there are.
    """

    index: int
    content: Any
    mask: Tensor | None = None
    tokens: int | None = None

    def count(self) -> int:
        """Return the label tokens; without labels the unmasked tokens, or else the examples."""
        labels = _entry(self.content, "labels")
        if isinstance(labels, Tensor):
            return int((labels != _IGNORED).sum()) if not labels.is_floating_point() else len(labels)
        if self.tokens is not None:
            return self.tokens
        tensors = list(_tensors(self.content))
        return len(tensors[0]) if tensors and tensors[0].dim() else 1


def check_batches(batches: object) -> None:
    """Refuse what is one batch or none.

    Raises:
        InvalidOption: it is not an iterable of batches.
    """
    if isinstance(batches, Mapping | Tensor | str):
        raise InvalidOption(
            f"batches is one {type(batches).__name__}, not an iterable of batches; put it in a list"
        )
    if not isinstance(batches, Iterable):
        raise InvalidOption(f"batches must be an iterable of batches, not {type(batches).__name__}")


def check_mask(mask: Mask) -> None:
    """Refuse a mask of an unknown name.

    Raises:
        InvalidOption: it is none of the names, None or a function.
    """
    if not (mask is None or mask in MASKS or callable(mask)):
        raise InvalidOption(
            f"mask must be 'padding', 'labels', None or a function of the batch, not {mask!r}"
        )


def prepared(index: int, content: Any, device: torch.device, mask: Mask) -> Batch:
    """Move a batch to the model's device and read its mask."""
    moved = _moved(content, device)
    found = _mask(moved, mask, index)
    tokens = None if found is None else int(found.sum())
    return Batch(index, moved, None if found is None or tokens == found.numel() else found, tokens)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping) and hasattr(value, "to"):  # what a tokenizer returns; moved in place
        return copy.copy(value).to(device)
    if isinstance(value, Mapping):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(entry, device) for entry in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


def _entry(content: Any, name: str) -> Any:
    return content.get(name) if isinstance(content, Mapping) else None


def _mask(content: Any, mask: Mask, index: int) -> Tensor | None:
    """Return which tokens count, (batch, tokens), or None where nothing says so.

    Raises:
        InvalidOption: what is given has other axes.
    """
    if mask is None:
        return None
    if callable(mask):
        return _two_axes(mask(content), f"batch {index}: mask(batch)")
    found = _entry(content, "attention_mask")
    padding = None if found is None else _two_axes(found, f"batch {index}: attention_mask")
    if mask == "padding":
        return padding
    labels = _entry(content, "labels")
    if labels is None:
        raise InvalidOption(f"batch {index} has no labels, which mask='labels' reads")
    counted = _token_labels(labels, index)
    if padding is not None and padding.shape != counted.shape:
        raise InvalidOption(
            f"batch {index}: labels {tuple(counted.shape)} and attention_mask {tuple(padding.shape)} differ "
            "in shape; pass mask=a function of the batch"
        )
    return counted if padding is None else counted & padding


def _token_labels(labels: Any, index: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise InvalidOption(
            f"batch {index}: labels have no axes (batch, tokens), which mask='labels' needs; use 'padding'"
        )
    return labels != _IGNORED


def _two_axes(mask: Any, what: str) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidOption(
            f"{what} is {shape}, not a tensor (batch, tokens); pass mask=a function of the batch"
        )
    return mask.bool()


def call(model: nn.Module, content: Any) -> Any:
    """Call a model on a batch: a mapping by keywords, a tuple by position, anything else as one argument."""
    if isinstance(content, Mapping):
        return model(**content)
    if isinstance(content, tuple | list):
        return model(*content)
    return model(content)


def loss_of(model: nn.Module, batch: Batch, loss: Loss | None, *, needed: bool) -> Tensor | None:
    """Run the model and return its loss, checked to be one finite number.

    Args:
        model: any module.
        batch: its arguments.
        loss: computes the loss from model and batch; None reads it off the output.
        needed: whether to refuse an output without a loss.

    Raises:
        Incompatible: there is no loss and it is needed, or it is no scalar.
        NotFinite: it is NaN or infinite.
    """
    if loss is not None:
        found: Any = loss(model, batch.content)
    else:
        out = call(model, batch.content)
        found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if not isinstance(found, Tensor):
        if needed:
            raise _no_loss(model, batch, loss)
        return None
    if found.numel() != 1:
        if needed:
            raise Incompatible(
                f"batch {batch.index}: the loss has shape {tuple(found.shape)}; it must be one number"
            )
        return None
    if not bool(found.isfinite().all()):
        raise NotFinite(f"the loss is {float(found.detach()):g}")
    return found.reshape(())


def _no_loss(model: nn.Module, batch: Batch, loss: Loss | None) -> Incompatible:
    where = f"batch {batch.index}"
    if loss is not None:
        return Incompatible(f"{where}: loss(model, batch) returned no tensor, and gradients need one number")
    labels = "" if _entry(batch.content, "labels") is not None else " and the batch has no labels"
    return Incompatible(
        f"{where}: {type(model).__name__} gives no loss{labels}; gradient statistics need one: add labels to "
        "the batches or pass loss=a function of (model, batch)"
    )


def digested(digest: str, content: Any) -> str:
    """Return a digest of everything seen so far and of a batch: its shapes and leading numbers."""
    hasher = hashlib.sha256(digest.encode())
    for leaf in tree_leaves(content if not isinstance(content, Mapping) else dict(content)):
        if isinstance(leaf, Tensor):
            head = leaf.detach().flatten()[:4096].double().cpu().contiguous()
            hasher.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode() + head.numpy().tobytes())
        else:
            plain = leaf is None or isinstance(leaf, str | int | float | bool)
            hasher.update((repr(leaf) if plain else type(leaf).__name__).encode())
    return hasher.hexdigest()
