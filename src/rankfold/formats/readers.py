"""Recognising what kind of adapter a file or folder holds, by what is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..errors import FormatError, MissingPath
from . import native, peft
from .changes import Changes
from .readers_files import read_file
from .readers_model import Places
from .readers_peft import read_folder

_FILES = (".safetensors", ".gguf")
# Files of tensors that mean nothing without the one beside them.
_EXPLAINED = ((native.RECORD, native.TENSORS), (peft.CONFIG, peft.TENSORS))
Reader = Callable[[Path, nn.Module | None], Changes]
_native: list[Reader] = []


def native_reader(reader: Reader) -> Reader:
    """Register what reads Rankfold's own folders, which takes the methods by which they were made."""
    _native[:] = [reader]
    return reader


def read(path: Path, model: nn.Module | None) -> Changes:
    """Read what lies at a path; see `read_changes`."""
    place = home(path)
    changes = _reader(place)(place, model)
    for weight, pair in changes.pairs.items():
        if not all(bool(factor.isfinite().all()) for factor in pair):
            raise FormatError(f"{place}: the change that it makes to {weight} is not finite")
    return changes if model is None else Places(model).fitted(changes)


def home(path: Path) -> Path:
    """Return the folder of a file that is explained by another one beside it, and any other path as it is."""
    for description, tensors in _EXPLAINED:
        if path.name in (description, tensors) and path.is_file() and (path.parent / description).is_file():
            return path.parent
    return path


def _reader(path: Path) -> Reader:
    if not path.exists():
        raise MissingPath(f"there is no file or folder {path}")
    if (path / native.RECORD).is_file():
        return _native[0]
    if (path / peft.CONFIG).is_file():
        return read_folder
    file = path if path.is_file() else _only_file(path)
    for description, tensors in _EXPLAINED:
        if file.name == tensors:
            raise MissingPath(f"there is no file {file.parent / description}, which explains {tensors}")
    return lambda _, model: read_file(file, model)


def _only_file(folder: Path) -> Path:
    """Return the one file of a folder that may hold changes.

    Raises:
        MissingPath: there is none.
        FormatError: there are several.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in _FILES and file.is_file())
    if not files:
        raise MissingPath(f"{folder} holds neither {native.RECORD} nor {peft.CONFIG}, nor a file of changes")
    if len(files) > 1:
        raise FormatError(f"{folder} holds {files[0].name} and {files[1].name}; name one of them")
    return files[0]
