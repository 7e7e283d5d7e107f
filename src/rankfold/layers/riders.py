"""Which adapters are being trained by something that rides on an optimizer's steps."""

from __future__ import annotations

import weakref
from typing import Any

# Neither the model nor its adapters hold what rides on them, so that copies and files of them do not either.
_RIDERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def ride(rider: Any, adapter: Any) -> None:
    """Remember that something acts on an adapter until it lets go or is gone."""
    _RIDERS[rider] = adapter


def let_go(rider: Any) -> None:
    """Forget what no longer acts."""
    _RIDERS.pop(rider, None)


def is_ridden(adapter: Any) -> bool:
    """Say whether something acts on an adapter."""
    return any(ridden is adapter for ridden in _RIDERS.values())
