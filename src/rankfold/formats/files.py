"""Reading and writing folders: complete or not at all, and never running code from a file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, MissingPath, OutputExists

_LARGEST_JSON = 64 * 2**20


@contextlib.contextmanager
def complete_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` when the block ends without an error.

    Args:
        path: the folder to write.
        overwrite: replace a folder that is there and not empty.

    Raises:
        OutputExists: the folder is there, not empty, and `overwrite` is false.
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise where a path exists that must not be replaced.

    Raises:
        OutputExists: it is a file, or a folder that is not empty and `overwrite` is false.
    """
    if target.is_file():
        raise OutputExists(f"{target} is a file, not a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputExists(
            f"{target} exists and is not empty; pass overwrite=True (--overwrite) to replace it"
        )


def _swap(temporary: Path, target: Path) -> None:
    """Put a finished folder in the place of another; the old one goes only after the new one is there."""
    if not target.exists():
        os.replace(temporary, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, old / "was")
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, so that equal data give equal bytes."""
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


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
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} does not hold a JSON object")
    return data


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, sorted by name, so that equal tensors give equal bytes."""
    from safetensors.torch import save_file

    plain = {key: tensors[key].detach().to("cpu").contiguous().clone() for key in sorted(tensors)}
    save_file(plain, str(path), metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        MissingPath: there is no such file.
        FormatError: it is truncated or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise MissingPath(f"there is no file {path}")
    try:
        return load_file(str(path))
    except (
        SafetensorError,
        ValueError,
        KeyError,
        RuntimeError,
        OSError,
        torch.cuda.OutOfMemoryError,
    ) as error:
        raise FormatError(f"{path} is truncated or no safetensors file: {error}") from None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
