"""Statistics as one safetensors file: the sums as tensors, everything else as JSON in its header.

Tensor names are `<path>:<number of the statistic>:<sum>`. The header holds a hash of the tensors and one of
itself, so a changed byte is noticed; nothing in the file is ever run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FormatError, MissingPath, OutputExists
from ..formats.files import complete_file, json_text
from ..formats.native import record_digest
from .reducers import Asked, Reducer
from .statistics import Statistics, WeightStatistics

FORMAT_VERSION = 1
_KEY, _KIND = "rankfold", "statistics"


def save(statistics: Statistics, path: Path, extra: dict[str, Any] | None = None) -> None:
    """Write statistics, complete or not at all; `extra` is kept in the record under "progress"."""
    from safetensors.torch import save_file

    check_place(path)
    tensors, record = tensors_of(statistics), record_of(statistics)
    record |= {"progress": extra or {}, "tensors": _hash(tensors)}
    record["sha256"] = record_digest(record)
    with complete_file(path) as partial:
        save_file(tensors, str(partial), metadata={_KEY: json_text(record)})


def check_place(path: Path) -> None:
    """Refuse a path at which no file can be written.

    Raises:
        MissingPath: its folder does not exist.
        OutputExists: it is a folder.
    """
    if not path.parent.is_dir():
        raise MissingPath(f"there is no folder {path.parent} for {path.name}")
    if path.is_dir():
        raise OutputExists(f"{path} is a folder; name a file")


def tensors_of(statistics: Statistics) -> dict[str, Tensor]:
    """Return every sum by its name in the file; sums that weights share appear once."""
    found = {}
    for path, entry in statistics.items():
        for index, reducer in enumerate(entry.reducers):
            if reducer.side != "input" or not entry.shares_input:
                found.update({f"{path}:{index}:{key}": value for key, value in reducer.sums.items()})
    return {key: value.detach().cpu().contiguous().clone() for key, value in sorted(found.items())}


def record_of(statistics: Statistics) -> dict[str, Any]:
    """Return everything but the sums, as plain data."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": _KIND,
        "what": [[name, options] for name, options in statistics.what],
        "batches": statistics.batches,
        "skipped": statistics.skipped,
        "base": statistics.base,
        "order": list(statistics),
        "weights": {
            path: {
                "shape": list(entry.shape), "tokens": entry.tokens, "leader": entry.leader,
                "tied": list(entry.tied),
            }
            for path, entry in statistics.items()
        },
    }  # fmt: skip


def _hash(tensors: dict[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        hasher.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        hasher.update(value.numpy().tobytes())
    return hasher.hexdigest()


def load(path: Path) -> Statistics:
    """Read statistics.

    Raises:
        MissingPath: there is no such file.
        FormatError: it is truncated, changed, or of another format.
    """
    return load_with_progress(path)[0]


def load_with_progress(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """Read statistics and what was kept beside them.

    Raises:
        MissingPath: there is no such file.
        FormatError: it is truncated, changed, or of another format.
    """
    metadata, tensors = _read(path)
    record = _record(path, metadata)
    if record.get("tensors") != _hash(tensors):
        raise FormatError(f"{path} was changed: its tensors' hash is not the one in its record")
    try:
        return parse(record, tensors), dict(record["progress"])
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(f"{path} does not describe statistics: {error}") from None


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingPath(f"there is no file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
            return file.metadata() or {}, tensors
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise FormatError(f"{path} is truncated or no safetensors file: {error}") from None


def _record(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        record = json.loads(metadata.get(_KEY, "null"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} has a header that is not valid JSON: {error}") from None
    if not isinstance(record, dict) or record.get("kind") != _KIND:
        raise FormatError(f"{path} holds no statistics")
    version = record.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise FormatError(f"{path} has no format version")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version}; this Rankfold reads up to {FORMAT_VERSION}: update it"
        )
    if record.get("sha256") != record_digest(record):
        raise FormatError(f"{path} was changed after it was written: its hash is not the one in it")
    return record


def parse(record: dict[str, Any], tensors: dict[str, Tensor]) -> Statistics:
    """Build statistics from a record and the sums.

    Raises:
        FormatError: they do not fit together.
    """
    what = tuple(Asked.of(str(name), dict(options)) for name, options in record["what"])
    sums = _sorted(tensors, len(what))
    weights: dict[str, WeightStatistics] = {}
    for path in record["order"]:
        weights[path] = _weight(path, what, record, sums, weights)
    if any(path not in weights for path, _ in sums):
        raise FormatError("it holds sums of a weight that its record does not name")
    _check_base(record["base"]["weights"], weights)
    return Statistics(
        what, weights, batches=int(record["batches"]), skipped=int(record["skipped"]), base=record["base"]
    )


def _check_base(known: dict[str, Any], weights: dict[str, WeightStatistics]) -> None:
    """Refuse a record that does not say by which numbers its model is known."""
    for path, entry in weights.items():
        sample = [float(value) for value in known[path]["sample"]]
        if tuple(known[path]["shape"]) != entry.shape or not sample or float(known[path]["rms"]) < 0:
            raise FormatError(f"it does not describe the weight {path}")


def _sorted(tensors: dict[str, Tensor], count: int) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Return the sums by weight and number of the statistic."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, value in tensors.items():
        path, index, key = name.rsplit(":", 2)
        if not 0 <= int(index) < count:
            raise FormatError(f"it holds {name}, and there are {count} statistics")
        found.setdefault((path, int(index)), {})[key] = value
    return found


def _weight(
    path: str,
    what: tuple[Asked, ...],
    record: dict[str, Any],
    sums: dict[tuple[str, int], dict[str, Tensor]],
    earlier: dict[str, WeightStatistics],
) -> WeightStatistics:
    known = record["weights"][path]
    (out, columns), leader = map(int, known["shape"]), str(known["leader"])
    reducers: list[Reducer] = []
    for index, asked in enumerate(what):
        if asked.side == "input" and leader != path:
            reducers.append(earlier[leader].reducers[index])
            continue
        reducers.append(asked.reducer())
        reducers[-1].restore(sums.get((path, index), {}), out, columns)
    return WeightStatistics(
        path, (out, columns), what, tuple(reducers), tokens=int(known["tokens"]),
        batches=int(record["batches"]), leader=leader, tied=tuple(map(str, known["tied"])),
    )  # fmt: skip
