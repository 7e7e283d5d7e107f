"""What gates remember with a key-value cache: it lives on the cache, is copied with it, follows its rows."""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

_KEPT = "_rankfold_kept"
_MOVES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset")


@runtime_checkable
class Follows(Protocol):
    """A value that knows what becomes of it when rows of a cache move or tokens go."""

    @property
    def count(self) -> int:
        """How many rows it has."""

    def rows(self, index: Tensor) -> Any:
        """Return the value of these rows."""

    def cropped(self, tokens: int) -> Any:
        """Return the value when so many tokens are left."""


def kept_with(cache: Any, mark: str) -> dict[str, Any] | None:
    """Return what was kept with a cache under a mark, or None."""
    found: dict[str, Any] | None = getattr(cache, "__dict__", {}).get(_KEPT, {}).get(mark)
    return found


def keep_with(cache: Any, mark: str, kept: dict[str, Any]) -> None:
    """Keep something with a cache; from now on it follows what is done to the cache between forwards."""
    if not hasattr(cache, "__dict__"):
        return
    cache.__dict__.setdefault(_KEPT, {})[mark] = kept
    for name in _MOVES:
        if hasattr(type(cache), name) and name not in cache.__dict__:
            cache.__dict__[name] = Move(cache, name)


class Move:
    """A method of a cache that also moves what is kept with the cache."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do it to the cache and to what is kept with it."""
        result = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        given = [*args, *kwargs.values()]
        for kept in self.cache.__dict__.get(_KEPT, {}).values():
            moved = {key: self._moved(value, given) for key, value in kept.items()}
            kept.clear()
            kept.update({} if self.name == "reset" else moved)
        return result

    def _moved(self, value: Any, given: list[Any]) -> Any:
        if hasattr(type(value), self.name):  # the cache of a pass of its own
            getattr(value, self.name)(*given)
        elif isinstance(value, Follows) and self.name == "crop":
            return value.cropped(int(self.cache.get_seq_length()))
        elif isinstance(value, Tensor | Follows) and self.name not in ("crop", "reset"):
            return self._rows(value, given[0])
        return value

    def _rows(self, value: Any, given: Any) -> Any:
        """Return a value of which row i belongs to row i of the cache, as those rows are now."""
        count = len(value) if isinstance(value, Tensor) else value.count
        if self.name == "batch_repeat_interleave":
            index = torch.arange(count).repeat_interleave(int(given))
        else:
            index = torch.as_tensor(given)
        return value[index.to(value.device)] if isinstance(value, Tensor) else value.rows(index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Move:
        return Move(copy.deepcopy(self.cache, memo), self.name)
