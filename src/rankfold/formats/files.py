"""Reading and writing folders: complete or not at all, and never running code from a file."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FormatError, MissingPath, OutputExists

_LARGEST_JSON = 64 * 2**20
_HERE, _EXCHANGE = -100, 2  # of renameat2: relative to the current folder; both names keep existing


@contextlib.contextmanager
def complete_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` when the block ends without an error.

    Args:
        path: the folder to write; of a link, the folder that it leads to.
        overwrite: replace a folder that is there and not empty.

    Raises:
        OutputExists: the folder is there, not empty, and `overwrite` is false; or it cannot be replaced.
    """
    target = Path(path).resolve()
    refuse_existing(target, overwrite=overwrite)
    make_parent(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_parent(target: Path) -> None:
    """Make the folder in which something is to be written.

    Raises:
        OutputExists: a file stands in its way.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OutputExists(f"{target} cannot be made: a part of its path is a file") from None


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise where a path exists that must not be replaced.

    Raises:
        OutputExists: it is a file, or a folder that is not empty and `overwrite` is false, or the folder in
            which the process works.
    """
    if target.is_file():
        raise OutputExists(f"{target} is a file, not a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputExists(
            f"{target} exists and is not empty; pass overwrite=True (--overwrite) to replace it"
        )
    if target.is_dir() and Path.cwd().is_relative_to(target.resolve()):
        raise OutputExists(f"{target} is or holds the current folder, which is not replaced; name another")


def _swap(temporary: Path, target: Path) -> None:
    """Put a finished folder in the place of another, which goes only after the new one is there."""
    if not target.exists():
        temporary.replace(target)
    elif not _exchanged(temporary, target):
        old = temporary.with_name(f"{temporary.name}.old")
        target.replace(old)
        try:
            temporary.replace(target)
        except OSError:
            old.replace(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(first: Path, second: Path) -> bool:
    """Let two folders change names in one step, so that there is never none; say whether the system could."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    names = os.fsencode(first), os.fsencode(second)
    return exchange is not None and exchange(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; what is written there takes its place if the block ends without an error.

    A link in its place is replaced, never written through.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def json_text(data: Mapping[str, Any]) -> str:
    """Return JSON with sorted keys, so that equal data give equal text.

    Raises:
        FormatError: something in it is no plain data.
    """
    try:
        return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"cannot write this as JSON: {error}") from None


def _plain(value: Any) -> Any:
    """Return the number in a scalar of numpy or torch."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    raise TypeError(f"{value!r} is no plain data")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys."""
    write_text(path, json_text(data) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, complete or not at all."""
    with complete_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        MissingPath: there is no such file.
        FormatError: it is no JSON object.
    """
    if not path.is_file():
        raise MissingPath(f"there is no file {path}")
    if path.stat().st_size > _LARGEST_JSON:
        raise FormatError(f"{path} is larger than any description of an adapter")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} does not hold a JSON object")
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, sorted by name, so that equal tensors give equal bytes."""
    from safetensors.torch import save_file

    plain = _separate(tensors)
    with complete_file(path) as partial:
        save_file(plain, str(partial), metadata={"format": "pt"})


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with memory of their own, sorted by name; what has it already is not copied."""
    plain, seen = dict[str, Tensor](), set[int]()
    for key in sorted(tensors):
        tensor = tensors[key].detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[key] = tensor
    return plain


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        MissingPath: there is no such file.
        FormatError: it is truncated, no safetensors file, or there is a pickled one in its place.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    pickled = path.with_suffix(".bin")
    if not path.is_file() and pickled.is_file():
        raise FormatError(f"{pickled} is pickled, could run code and is not read; save it as safetensors")
    if not path.is_file():
        raise MissingPath(f"there is no file {path}")
    try:
        return load_file(str(path))
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise FormatError(f"{path} is truncated or no safetensors file: {error}") from None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
