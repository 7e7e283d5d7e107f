"""The repeated blocks of a model: finding them, running some of them, and taking one out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayer
from ..statistics.batches import call

_CACHES = ("past_key_values", "past_key_value", "layer_past", "use_cache")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def block_list(model: nn.Module) -> nn.ModuleList:
    """Return the longest list of modules of one class, at least two, which are a model's blocks.

    Raises:
        UnsupportedLayer: there is none.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1]
    found = max(lists, key=len, default=None)
    if found is None or len(found) < 2:
        raise UnsupportedLayer(f"{type(model).__name__} has no list of blocks of one class")
    return found


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states that a block gives, alone or as the first of several."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class Skipped(nn.Module):
    """Stands in a block's place and hands on what comes in, in the form in which the block returns it.

    Args:
        block: that is skipped; it is not registered.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)
        self.tupled: bool | None = None

    def __getattr__(self, name: str) -> Any:
        """Return what the block knows of itself, such as the kind of its attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_block" not in self.__dict__:
                raise
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states."""
        if self.tupled is None:  # how the block answers is known once it was asked
            self.tupled = isinstance(self._block[0](hidden_states, *args, **kwargs), tuple)
        return (hidden_states,) if self.tupled else hidden_states


@contextmanager
def without(blocks: nn.ModuleList, index: int) -> Iterator[None]:
    """Skip a block until the context ends."""
    block = blocks[index]
    blocks[index] = Skipped(block)
    try:
        yield
    finally:
        blocks[index] = block


class Calls:
    """With which arguments a block is called, and what it gives, over batches.

    Args:
        model: that is run, without gradients.
        block: in it.
        batches: their content.
    """

    def __init__(self, model: nn.Module, block: nn.Module, batches: Sequence[Any]) -> None:
        self.inputs: list[tuple[Tensor, tuple[Any, ...], Mapping[str, Any]]] = []
        self.outputs: list[Tensor] = []
        handle = block.register_forward_hook(self._seen, with_kwargs=True)
        try:
            with torch.no_grad():
                for content in batches:
                    call(model, content)
        finally:
            handle.remove()

    def _seen(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        # A cache of keys would grow by every call that is repeated.
        rest = {k: None if k in _CACHES else v for k, v in kwargs.items() if k != "hidden_states"}
        hidden = args[0] if args else kwargs["hidden_states"]
        names = [*inspect.signature(block.forward).parameters][: len(args)]
        further = tuple(
            None if name in _CACHES else value for name, value in zip_longest(names[1:], args[1:])
        )
        self.inputs.append((hidden.detach(), further, rest))
        self.outputs.append(hidden_of(output).detach())


def through(
    blocks: Sequence[nn.Module], hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """Return hidden states after some blocks, one after the other."""
    for block in blocks:
        hidden = hidden_of(block(hidden, *args, **kwargs))
    return hidden


def put_back(blocks: nn.ModuleList, before: Sequence[nn.Module]) -> None:
    """Let a list hold these blocks again."""
    while len(blocks):
        del blocks[len(blocks) - 1]
    blocks.extend(before)


def take_out(model: nn.Module, blocks: nn.ModuleList, index: int) -> nn.Module:
    """Take a block out of a model and let its configuration, and the others' own indices, say so."""
    block = blocks[index]
    del blocks[index]
    config = getattr(model, "config", None)
    before = len(blocks) + 1
    for name in _COUNTS:
        if getattr(config, name, None) == before:
            setattr(config, name, len(blocks))
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == before:
        config.layer_types = kinds[:index] + kinds[index + 1 :]  # type: ignore[union-attr]
    for place, other in enumerate(blocks):
        for module in other.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]  # an int there, too
    return block
