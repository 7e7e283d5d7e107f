"""A first pass through a model, whose last hidden states decide about the gates of the second."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import Incompatible, UnsupportedLayer
from ..weights import Gate
from .carrier import ModelInputs
from .targets import blocks


class FirstPass:
    """Runs a model on its inputs before its forward proper, with a key-value cache of its own.

    Args:
        name: of what is remembered with the caller's cache.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def hidden(self, model: nn.Module, inputs: ModelInputs, gate: Gate) -> Tensor:
        """Return the last hidden states (batch, token, d), without gradients.

        Args:
            model: the root.
            inputs: of the forward that is about to run.
            gate: that the asking rule has in this pass.

        Raises:
            Incompatible: the key-value cache was filled without this pass.
            UnsupportedLayer: the model has neither a base model nor repeated blocks.
        """
        own = inputs.kept.get(self.name)
        if own is None and inputs.past:
            raise Incompatible(
                f"the {self.name} does not know what this key-value cache holds; pass a cache that this "
                "adapter has filled, or none"
            )
        if own is None and inputs.cache is not None:
            own = copy.deepcopy(inputs.cache)
        with last_hidden(model) as seen:
            output = inputs.again(gate, labels=None, past_key_values=own)
        inputs.kept[self.name] = getattr(output, "past_key_values", None)
        return seen[-1]


@contextlib.contextmanager
def last_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, collect the last hidden states (batch, token, d) of every forward of a model.

    They are what the base model of a transformers model returns, else the output of the last repeated block.

    Raises:
        UnsupportedLayer: the model has neither.
    """
    body = getattr(model, "base_model", None)
    module = (
        body if isinstance(body, nn.Module) else next((t.module for t in list(blocks(model))[::-1]), None)
    )
    if module is None:
        raise UnsupportedLayer(
            f"the last hidden states of {type(model).__name__} are not known: it has neither a base_model "
            "nor repeated blocks"
        )
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", output)
        seen.append(hidden[0] if isinstance(hidden, tuple) else hidden)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
