"""The native form of an adapter: a folder of `rankfold.json`, `rankfold.safetensors` and a model card.

The JSON holds the recipe, ranks, seed, versions, the base's name and revision, a cheap fingerprint of the base and
the hash of the tensor file. Tensor names are `<module path>:<leaf>`, `shared:<key>` for what layers share, and
`whole:<parameter>` for modules trained whole; they never depend on a position in an expression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, FormatError, MissingPath
from ..layers import Adaptation, StructuredLayer
from . import card
from .files import complete_folder, digest, read_json, read_tensors, write_json, write_tensors

FORMAT_VERSION = 1
RECORD, TENSORS = "rankfold.json", "rankfold.safetensors"
_SAMPLES = 8
_TOLERANCE = (
    0.3  # of the root mean square: quantised and half-precision copies of a base pass, other bases do not
)


@dataclass(frozen=True)
class NativeAdapter:
    """An adapter as it lies in a folder.

    Attributes:
        record: what `rankfold.json` holds.
        tensors: the tensors by saved name.
    """

    record: dict[str, Any]
    tensors: dict[str, Tensor]


def tensors_of(adaptation: Adaptation, name: str) -> dict[str, Tensor]:
    """Return everything of an adapter that is saved, by saved name."""
    found = {key: getattr(module, attribute) for key, (module, attribute) in adaptation.owned(name).items()}
    found.update({f"whole:{key}": value for key, value in adaptation.whole(name).items()})
    return {key: value.detach() for key, value in found.items()}


def fill(adaptation: Adaptation, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into an adapter that is in place.

    Raises:
        FormatError: names or shapes differ; nothing is copied then.
    """
    places = tensors_of(adaptation, name)
    check_names({key: tuple(value.shape) for key, value in places.items()}, tensors)
    with torch.no_grad():
        for key, value in places.items():
            value.copy_(tensors[key])


def check_names(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        FormatError: they differ; the sentence names the first difference.
    """
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing:
        raise FormatError(f"the adapter file lacks {missing[0]} ({len(missing)} tensors missing)")
    if extra:
        raise FormatError(
            f"the adapter file holds {extra[0]}, which its recipe does not have ({len(extra)} such)"
        )
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise FormatError(f"{key} has shape {tuple(tensors[key].shape)} in the file, not {tuple(shape)}")


def base_of(model: nn.Module, layers: Mapping[str, StructuredLayer]) -> dict[str, Any]:
    """Describe the base: class, name, revision, and per weight its shape and a few of its numbers."""
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "name": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", None),
        "weights": {path: _fingerprint(layer) for path, layer in layers.items()},
    }


@torch.no_grad()
def _fingerprint(layer: StructuredLayer) -> dict[str, Any]:
    matrix = layer.matrix()
    sample = _sample(matrix)
    rms = float(torch.linalg.vector_norm(matrix, dtype=torch.float32)) / max(1, matrix.numel()) ** 0.5
    return {
        "shape": list(matrix.shape),
        "sample": [float(f"{v:.6g}") for v in sample],
        "rms": float(f"{rms:.6g}"),
    }


def _sample(matrix: Tensor) -> list[float]:
    rows = torch.linspace(0, matrix.shape[0] - 1, _SAMPLES).long()
    columns = torch.linspace(0, matrix.shape[1] - 1, _SAMPLES).flip(0).long()
    picked = matrix[rows.to(matrix.device), columns.to(matrix.device)]
    return [float(v) for v in picked.float().cpu()]


def check_base(model: nn.Module, record: Mapping[str, Any], layers: Mapping[str, StructuredLayer]) -> None:
    """Compare a model with the base that an adapter was made for.

    Raises:
        BaseMismatch: a shape differs, or the numbers are those of another model.
    """
    weights, total, distance = record["base"]["weights"], 0.0, 0.0
    for path, layer in layers.items():
        known = weights.get(path)
        if known is None:
            raise FormatError(f"the adapter's record says nothing of {path}")
        if list(layer.shape) != list(known["shape"]):
            shape = "x".join(map(str, layer.shape))
            raise BaseMismatch(
                f"{path} is {shape} here and {'x'.join(map(str, known['shape']))} in the adapter's base"
            )
        now = _sample(layer.matrix().detach())
        distance += sum(abs(a - b) for a, b in zip(now, known["sample"], strict=True))
        total += known["rms"] * _SAMPLES
    if total and distance / total > _TOLERANCE:
        name = record["base"].get("name") or record["base"].get("class")
        raise BaseMismatch(
            f"the adapter was made for another base ({name}): its weights' numbers are not those here"
        )


def write(
    path: str | Path,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter folder, complete or not at all."""
    with complete_folder(path, overwrite=overwrite) as folder:
        write_into(folder, record, tensors, TENSORS, notes)
    return Path(path)


def write_into(
    folder: Path,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    file: str,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write record, tensors and card into a folder that exists; the record comes last."""
    write_tensors(folder / file, tensors)
    full = {
        **record,
        "format_version": FORMAT_VERSION,
        "tensors": {"file": file, "sha256": digest(folder / file)},
    }
    (folder / "README.md").write_text(card.model_card(full, notes or {}), encoding="utf-8")
    write_json(folder / RECORD, full)


def read(path: str | Path) -> NativeAdapter:
    """Read an adapter folder.

    Raises:
        MissingPath: there is no such folder, or it holds no adapter.
        FormatError: it is truncated, changed, or of a newer format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingPath(f"there is no folder {folder}")
    record = read_json(folder / RECORD)
    _check_record(record, folder)
    file = folder / record["tensors"]["file"]
    if not file.is_file():
        raise MissingPath(f"{folder} lacks {file.name}")
    if digest(file) != record["tensors"]["sha256"]:
        raise FormatError(f"{file} is truncated or was changed: its hash is not the one in {RECORD}")
    return NativeAdapter(record, read_tensors(file))


def _check_record(record: dict[str, Any], folder: Path) -> None:
    version = record.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatError(
            f"{folder} has format version {version}; this Rankfold reads up to {FORMAT_VERSION}: update it"
        )
    kinds: dict[str, type | tuple[type, ...]] = {
        "format_version": int, "recipe": dict, "seed": int, "targets": list, "ranks": dict, "train": list,
        "base": dict, "tensors": dict, "plan": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind) or isinstance(record.get(key), bool):
            raise FormatError(f"{folder / RECORD} lacks {key!r} or has something else there")
    inner = record["tensors"]
    file, weights = inner.get("file"), record["base"].get("weights")
    if not isinstance(file, str) or Path(file).name != file or not isinstance(inner.get("sha256"), str):
        raise FormatError(f"{folder / RECORD} does not name its tensor file")
    if not isinstance(weights, dict) or not all(_is_fingerprint(w) for w in weights.values()):
        raise FormatError(f"{folder / RECORD} does not describe its base")
    if not all(isinstance(p, str) and p in record["ranks"] for p in record["targets"]):
        raise FormatError(f"{folder / RECORD} lacks the rank of a target")


def _is_fingerprint(known: Any) -> bool:
    if not isinstance(known, dict) or not isinstance(known.get("rms"), int | float):
        return False
    sample, shape = known.get("sample"), known.get("shape")
    numbers = (
        isinstance(sample, list)
        and len(sample) == _SAMPLES
        and all(isinstance(v, int | float) for v in sample)
    )
    return numbers and isinstance(shape, list) and all(isinstance(v, int) for v in shape)
