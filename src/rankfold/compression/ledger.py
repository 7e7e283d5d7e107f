"""What is solved already: in memory, or in a folder from which an interrupted compression goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, Incompatible, RankfoldError
from ..formats.files import json_text, read_json, read_tensors, write_json, write_tensors
from .objective import Solved
from .task import tensors_of

PLAN, RANKS = "plan.json", "ranks.json"


class NotKept(RankfoldError, OSError):
    """What is solved cannot be written to its folder."""


class Ledger:
    """The weights that are solved, by path.

    Args:
        folder: where they are written, one file each, complete or not at all; None keeps them in memory.
        plan: what must be the same for a compression to be continued.

    Raises:
        Incompatible: the folder holds another compression.
    """

    def __init__(self, folder: Path | None, plan: Mapping[str, Any]) -> None:
        self.folder = folder
        self._held: dict[str, Solved] = {}
        self._ranks: dict[str, int | None] | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN).is_file():
            write_json(folder / PLAN, plan)
            return
        known, asked = read_json(folder / PLAN), _plain(plan)
        for key in asked:
            if known.get(key) != asked[key]:
                raise Incompatible(
                    f"{folder} holds a compression with {key}={known.get(key)!r}, not {asked[key]!r}; finish "
                    "it as it was begun, or start anew"
                )

    @property
    def ranks(self) -> dict[str, int | None] | None:
        """The ranks that were shared out, or None."""
        if self.folder is not None and self._ranks is None and (self.folder / RANKS).is_file():
            self._ranks = read_json(self.folder / RANKS)
        return self._ranks

    @ranks.setter
    def ranks(self, found: dict[str, int | None]) -> None:
        self._ranks = found
        if self.folder is not None:
            write_json(self.folder / RANKS, found)

    def __contains__(self, path: str) -> bool:
        return path in self._held if self.folder is None else self._file(path).is_file()

    def __getitem__(self, path: str) -> Solved:
        if self.folder is None:
            return self._held[path]
        return _from_tensors(read_tensors(self._file(path)), self._file(path))

    def __setitem__(self, path: str, found: Solved) -> None:
        if self.folder is None:
            self._held[path] = found
            return
        write_kept(self._file(path), _to_tensors(found))

    def _file(self, path: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(path.encode()).hexdigest()[:24]}.safetensors"


def write_kept(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that a compression goes on from.

    Raises:
        NotKept: the library that writes tensors could not, as where the disk is full.
    """
    from safetensors import SafetensorError

    try:
        write_tensors(file, tensors)
    except SafetensorError as error:  # which is no OSError where the disk is full
        raise NotKept(f"{file} could not be written: {error}") from error


def digest(data: Any) -> str:
    """Return a digest of the tensors in nested data, by which a compression knows them again."""
    found = hashlib.sha256()
    for tensor in tensors_of(data):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{plain.dtype}{list(plain.shape)}".encode())
        found.update(plain.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return data as they are read back."""
    import json

    found: dict[str, Any] = json.loads(json_text(data))
    return found


def _to_tensors(found: Solved) -> dict[str, Tensor]:
    errors = torch.tensor([found.error, found.plain_error], dtype=torch.float64)
    tensors = {**{f"leaf.{name}": value for name, value in found.leaves.items()}}
    tensors |= {"spectrum": found.spectrum, "errors": errors}
    return tensors if found.shift is None else {**tensors, "shift": found.shift}


def _from_tensors(tensors: Mapping[str, Tensor], file: Path) -> Solved:
    try:
        error, plain_error = tensors["errors"].tolist()
        leaves = {
            key.removeprefix("leaf."): value for key, value in tensors.items() if key.startswith("leaf.")
        }
        return Solved(leaves, tensors.get("shift"), error, plain_error, tensors["spectrum"])
    except (KeyError, ValueError):
        raise FormatError(f"{file} is no part of a compression") from None
