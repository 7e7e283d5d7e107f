"""Whether models can be merged: the first thing in which they differ, as a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import Incompatible
from .models import Model, ModelFolder, Shape, vocabulary

# What decides how a model computes without showing in the shapes of its tensors.
_STRUCTURE = (
    "model_type", "num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "head_dim",
    "hidden_act", "hidden_activation", "activation_function", "rope_theta", "num_experts_per_tok",
)  # fmt: skip


def require_agreement(models: Sequence[Model]) -> None:
    """Compare every model with the first.

    Raises:
        Incompatible: two have another architecture or vocabulary.
    """
    first = models[0]
    for other in models[1:]:
        difference = _of_tensors(first, other) or _of_structure(first, other) or _of_vocabulary(first, other)
        if difference:
            raise Incompatible(f"{first.label} and {other.label} cannot be merged: {difference}")


def _of_tensors(first: Model, other: Model) -> str:
    for name, shape in first.tensors.items():
        if name not in other.tensors:
            return f"{other.label} has no {name}{_kinds(first, other)}"
        if shape.shape != other.tensors[name].shape:
            return _shapes(name, shape, other.tensors[name], first.config, other.config)
        if shape.is_merged != other.tensors[name].is_merged:
            return f"{name} is {_plain(shape)} in the one and {_plain(other.tensors[name])} in the other"
    more = next((name for name in other.tensors if name not in first.tensors), None)
    return f"{first.label} has no {more}{_kinds(first, other)}" if more else ""


def _shapes(name: str, one: Shape, two: Shape, config: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    sizes = config.get("vocab_size"), other.get("vocab_size")
    vocabularies = one.shape[1:] == two.shape[1:] and sizes == (one.shape[0], two.shape[0])
    why = "their vocabularies differ: " if vocabularies else ""
    return f"{why}{name} is {_times(one)} in the one and {_times(two)} in the other"


def _of_structure(first: Model, other: Model) -> str:
    one, two = first.config, other.config
    for key in _STRUCTURE if one and two else ():
        if one.get(key) != two.get(key):
            return f"{key} is {one.get(key)!r} in the one and {two.get(key)!r} in the other"
    return ""


def _of_vocabulary(first: Model, other: Model) -> str:
    if not (isinstance(first, ModelFolder) and isinstance(other, ModelFolder)):
        return ""
    one, two = vocabulary(first.path), vocabulary(other.path)
    if not one or not two or one == two:
        return ""
    token = min({token for token, _ in one.items() ^ two.items()}, key=lambda word: (one | two)[word])
    here, there = (f"number {words[token]}" if token in words else "absent" for words in (one, two))
    return f"their vocabularies differ: the token {token!r} is {here} in the one and {there} in the other"


def _kinds(first: Model, other: Model) -> str:
    """Return the model classes, where both say one and they differ."""
    one, two = ((model.config.get("architectures") or [""])[0] for model in (first, other))
    return f" (they are {one} and {two})" if one and two and one != two else ""


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape.shape)) or "a single number"


def _plain(shape: Shape) -> str:
    return str(shape.dtype).removeprefix("torch.")
