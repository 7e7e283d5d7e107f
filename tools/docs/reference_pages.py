"""The reference: every public name, by what it is for, and the words that expressions are built from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import rankfold as rf
from rankfold import pretrain

# By the room that a name lives in.
ROOMS = {
    "methods": "Methods, points and training",
    "layers": "The adapted model",
    "statistics": "Data",
    "formats": "Files",
    "training": "transformers.Trainer",
    "errors": "Errors",
}
HEAD = """# Reference

Everything on this page is used as `rf.adapt`, `rf.fold` and so on, after `import rankfold as rf`. The words
of expressions have [a page of their own](weights.md). The command line prints its own: `rankfold --help`.
"""
ERRORS = """## All errors

Every error is a `RankfoldError` and the builtin error that it refines, so either may be caught. They live in
`rankfold.errors`.
"""
WEIGHTS = """# Expressions

A weight is an expression over structured maps, built with `+`, `@` and `*` from leaves; `print` shows it as a
formula. Everything on this page lives in `rankfold.weights`; what every expression can be asked for is said
of `Weight`.
"""
PRETRAIN = """# Pretraining

What `rankfold pretrain` is made of. Everything on this page lives in `rankfold.pretrain`;
[the guide](../guide/pretrain.md) shows its use.
"""


def pages() -> dict[str, str]:
    """Return the pages by their path under docs/."""
    return {
        "reference/index.md": _public(),
        "reference/weights.md": _weights(),
        "reference/pretrain.md": _pretrain(),
    }


def navigation() -> list[dict[str, str]]:
    """Return the pages as entries of the site's navigation."""
    return [
        {"Functions and classes": "reference/index.md"},
        {"Expressions": "reference/weights.md"},
        {"Pretraining": "reference/pretrain.md"},
    ]


def _public() -> str:
    named = {name: getattr(rf, name) for name in rf.__all__}
    found = {
        name: value for name, value in named.items() if inspect.isclass(value) or inspect.isfunction(value)
    }
    rooms = {name: value.__module__.split(".")[1] for name, value in found.items()}
    parts = [HEAD]
    for room in dict.fromkeys([*ROOMS, *rooms.values()]):
        mine = [found[name] for name in found if rooms[name] == room]
        if mine:
            parts += [f"## {ROOMS.get(room, room.capitalize())}\n", *map(_entry, sorted(mine, key=_is_class))]
    parts += [ERRORS, *(_entry(error, members=False) for error in _classes(rf.errors))]
    return "\n".join([*parts, "## Version\n", "`rankfold.__version__` is the version of the package.\n"])


def _weights() -> str:
    named = [getattr(rf.weights, name) for name in rf.weights.__all__]
    words = [word for word in named if inspect.isclass(word) or inspect.isfunction(word)]
    words.sort(key=lambda word: (word is not rf.weights.Weight, _is_class(word)))
    return "\n".join([WEIGHTS, *(_entry(word, members=word is rf.weights.Weight) for word in words)])


def _pretrain() -> str:
    words = [getattr(pretrain, name) for name in pretrain.__all__]
    return "\n".join([PRETRAIN, *map(_entry, sorted(words, key=_is_class))])


def _is_class(value: object) -> bool:
    return inspect.isclass(value)


def _classes(module: ModuleType) -> Iterator[type]:
    for value in vars(module).values():
        if inspect.isclass(value) and value.__module__ == module.__name__ and value is not rf.RankfoldError:
            yield value


def _entry(value: Any, *, members: bool = True) -> str:
    """Return the directive that shows an object where it is defined, because a module may share its name."""
    options = "" if members else "    options:\n      members: false\n"
    return f"::: {value.__module__}.{value.__qualname__}\n{options}"
