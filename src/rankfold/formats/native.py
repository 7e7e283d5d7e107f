"""The native form of an adapter: a folder of `rankfold.json`, `rankfold.safetensors` and a model card.

The JSON holds the recipe, ranks, seed, versions, the base's name and revision, a cheap fingerprint of the
base, the hash of the tensor file and its own. Tensor names are `<module path>:<leaf>`, `shared:<key>` for
what layers share, and `whole:<parameter>` for modules trained whole; they never depend on a position in an
expression.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, FormatError, MissingPath
from ..layers import Adaptation, StructuredLayer, kind_of
from ..weights import Weight, adopt_ranks, adopt_selections, owned
from ..weights.kernels import at_least_float32
from . import card
from .files import (
    complete_folder,
    digest,
    json_text,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)

FORMAT_VERSION = 1
RECORD, TENSORS = "rankfold.json", "rankfold.safetensors"
CHECKPOINT_TENSORS = "model.safetensors"  # the name that trainers look for
_SAMPLES = 8
# Of the root mean square, over all weights and for any one of them: quantised and half-precision copies of a
# base pass, other bases do not.
_TOLERANCE, _TOLERANCE_OF_ONE = 0.3, 0.6


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
    for path, expression in adaptation.expressions(name).items():
        adopt_selections(expression, leaves_of(path, tensors))
    if "ranks" in adaptation.adapter(name).record["recipe"]:
        for path, expression in adaptation.expressions(name).items():
            adopt_ranks(expression, leaves_of(path, tensors))
    places = tensors_of(adaptation, name)
    check_names({key: tuple(value.shape) for key, value in places.items()}, tensors)
    with torch.no_grad():
        for key, value in places.items():
            value.copy_(tensors[key])


def fill_expression(path: str, expression: Weight, leaves: Mapping[str, Tensor]) -> None:
    """Copy values into the leaves of one expression.

    Args:
        path: of the weight, for the sentence.
        expression: whose leaves are filled.
        leaves: by the leaves' names.

    Raises:
        FormatError: names or shapes differ; nothing is copied then.
    """
    places = check_expression(path, expression, leaves)
    with torch.no_grad():
        for leaf, value in places.items():
            value.copy_(leaves[leaf])


def check_expression(path: str, expression: Weight, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compare names and shapes with the leaves of one expression, and return these by name.

    Raises:
        FormatError: they differ.
    """
    places = {leaf: getattr(module, attribute) for leaf, (module, attribute) in owned(expression).items()}
    check_names({leaf: tuple(value.shape) for leaf, value in places.items()}, leaves, path)
    return places


def leaves_of(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one layer by leaf name."""
    start = f"{path}:"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def check_names(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], what: str = "the adapter file"
) -> None:
    """Compare names and shapes.

    Raises:
        FormatError: they differ; the sentence names the first difference.
    """
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing:
        raise FormatError(f"{what} lacks {missing[0]} ({len(missing)} tensors missing)")
    if extra:
        raise FormatError(f"{what} holds {extra[0]}, which its recipe does not have ({len(extra)} such)")
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise FormatError(f"{key} has shape {tuple(tensors[key].shape)} in the file, not {tuple(shape)}")


def anchors(
    model: nn.Module, paths: Iterable[str], layers: Mapping[str, StructuredLayer]
) -> dict[str, StructuredLayer]:
    """Return the layers by which a base is known, by path.

    They are the adapted layers; where a module's output is edited, the first layer inside it.
    """
    found: dict[str, StructuredLayer] = {}
    for path in paths:
        inside = {path: layers[path]} if path in layers else _first_layer(model, path)
        found.update(inside)
    return found


def _first_layer(model: nn.Module, path: str) -> dict[str, StructuredLayer]:
    for name, module in model.get_submodule(path).named_modules():
        kind = None if isinstance(module, StructuredLayer) else kind_of(module)
        layer = kind(module) if kind else module
        if isinstance(layer, StructuredLayer):
            return {f"{path}.{name}" if name else path: layer}
    return {}


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
    if layer.is_released:
        return {"shape": list(layer.shape), "sample": [], "rms": 0.0, **form_of(layer)}
    matrix = layer.matrix()
    rms = _root_mean_square(matrix)
    if not math.isfinite(rms):
        rms = _root_mean_square(matrix.float().nan_to_num(0, 0, 0))
    return {
        "shape": list(matrix.shape),
        "sample": [float(f"{v:.6g}") for v in _sample(matrix)],
        "rms": float(f"{rms:.6g}"),
        **form_of(layer),
    }


def form_of(layer: StructuredLayer) -> dict[str, Any]:
    """Return what a weight is where it is not that of a linear layer; a kernel's window with it."""
    if layer.looked_up:
        return {"kind": "embedding"}
    if layer.materialised:
        return {"kind": "attention projection"}
    window = list(getattr(layer.op, "window", ()))
    grouped = "grouped " if layer.op.groups > 1 else ""
    return {"kind": f"{grouped}convolution", "window": window} if window else {}


def _root_mean_square(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=at_least_float32(matrix))) / math.sqrt(
        max(1, matrix.numel())
    )


def _sample(matrix: Tensor) -> list[float]:
    rows = torch.linspace(0, matrix.shape[0] - 1, _SAMPLES).long()
    columns = torch.linspace(0, matrix.shape[1] - 1, _SAMPLES).flip(0).long()
    picked = matrix[rows.to(matrix.device), columns.to(matrix.device)].float().cpu()
    return [float(v) if math.isfinite(v) else 0.0 for v in picked]


def check_base(record: Mapping[str, Any], layers: Mapping[str, StructuredLayer]) -> None:
    """Compare a model with the base that an adapter was made for.

    Args:
        record: of the adapter.
        layers: the layers by which the base is known (`anchors`).

    Raises:
        BaseMismatch: a shape differs, or the numbers are those of another model.
    """
    total, distance = 0.0, 0.0
    for path, layer in layers.items():
        known = record["base"]["weights"].get(path)
        if known is None:
            raise FormatError(f"the adapter's record says nothing of {path}")
        check_shape(path, layer, tuple(known["shape"]))
        if not known["sample"]:  # what was there before training was let go
            continue
        pairs = zip(_sample(layer.matrix().detach()), known["sample"], strict=True)
        apart, size = sum(abs(a - b) for a, b in pairs), known["rms"] * _SAMPLES
        if apart > _TOLERANCE_OF_ONE * size:
            raise _other_base(record, f"the numbers of {path} are others here")
        distance, total = distance + apart, total + size
    if distance > _TOLERANCE * total:
        raise _other_base(record, "its weights' numbers are not those here")


def check_shape(path: str, layer: StructuredLayer, known: tuple[int, ...]) -> None:
    """Compare the shape of a weight with that in an adapter's base.

    Raises:
        BaseMismatch: they differ.
    """
    if layer.shape != known:
        here, there = ("x".join(map(str, shape)) for shape in (layer.shape, known))
        raise BaseMismatch(f"{path} is {here} here and {there} in the adapter's base")


def _other_base(record: Mapping[str, Any], how: str) -> BaseMismatch:
    name = record["base"].get("name") or record["base"].get("class")
    return BaseMismatch(f"the adapter was made for another base ({name}): {how}")


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
    """Write record, tensors and card into a folder that exists; the record comes last.

    A record that is interrupted names the hash of a tensor file that is no longer there, and is refused.
    """
    write_tensors(folder / file, tensors)
    full = {
        **record,
        "format_version": FORMAT_VERSION,
        "tensors": {"file": file, "sha256": digest(folder / file)},
    }
    write_text(folder / "README.md", card.model_card(full, notes or {}))
    write_json(folder / RECORD, {**full, "sha256": record_digest(full)})


def record_digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record, its own entry left out."""
    text = json_text({key: value for key, value in record.items() if key != "sha256"})
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


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
    if digest(file) != record["tensors"].get("sha256"):
        raise FormatError(f"{file} is truncated or was changed: its hash is not the one in {RECORD}")
    return NativeAdapter(record, read_tensors(file))


# What a record holds at least, and of which type. A bool is no int here.
_KINDS: dict[str, type] = {
    "recipe": dict, "seed": int, "targets": list, "ranks": dict, "train": list, "base": dict, "tensors": dict,
    "plan": str,
}  # fmt: skip


def _check_record(record: dict[str, Any], folder: Path) -> None:
    file, version = folder / RECORD, record.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"{file} has no format version")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{folder} has format version {version}; this Rankfold reads up to {FORMAT_VERSION}: update it"
        )
    for key, kind in _KINDS.items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            raise FormatError(f"{file} lacks {key!r} or has something else there")
    if record.get("sha256") != record_digest(record):
        raise FormatError(f"{file} was changed after it was written: its hash is not the one in it")
    if record["tensors"].get("file") not in (TENSORS, CHECKPOINT_TENSORS):
        raise FormatError(f"{file} does not name its tensor file")
    weights = record["base"].get("weights")
    if not isinstance(weights, dict) or not all(_is_fingerprint(w) for w in weights.values()):
        raise FormatError(f"{file} does not describe its base")
    if not all(isinstance(p, str) and p in record["ranks"] for p in record["targets"]):
        raise FormatError(f"{file} lacks the rank of a target")


def _is_fingerprint(known: Any) -> bool:
    if not isinstance(known, dict):
        return False
    sample, shape, rms = known.get("sample"), known.get("shape"), known.get("rms")
    numbers = isinstance(sample, list) and len(sample) in (0, _SAMPLES) and all(map(_is_number, sample))
    sizes = isinstance(shape, list) and all(isinstance(n, int) for n in shape)
    return numbers and sizes and isinstance(rms, int | float) and _is_number(rms) and rms >= 0


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) <= 1e300  # neither infinite nor too large for a float
