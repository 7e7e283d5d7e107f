"""Merging models into a module, or into a folder that transformers loads."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
from ..formats.files import complete_folder, read_json, write_json, write_text
from .card import model_card
from .models import ModelFolder, Shape
from .report import MergeReport
from .sources import Sources
from .task import Task
from .writer import ShardWriter

# What a model's folder holds beside its weights, and what does not depend on them.
_COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab*", "merges.txt", "*.model", "*.tiktoken", "chat_template*", "*processor_config.json",
    "modules.json", "*sentence_*.json", "*_Pooling", "*_Normalize", "*.py",
)  # fmt: skip
_CHUNK = 2**18
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a type of real numbers by its name.

    Raises:
        InvalidOption: it is none of float64, float32, bfloat16, float16.

    Example:
        >>> dtype_named("bfloat16")
        torch.bfloat16
    """
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise InvalidOption(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype}")
    return found


def merge_modules(sources: Sources, task: Task, dtype: torch.dtype | None) -> tuple[nn.Module, MergeReport]:
    """Return a copy of the base, or of the first model, with merged weights."""
    report = started(sources, task, dtype)
    tensors = dict(_results(sources, task, dtype, report))
    return sources.module(tensors), report


def merge_folders(
    sources: Sources, task: Task, dtype: torch.dtype | None, out: Path, overwrite: bool, shard_bytes: int
) -> MergeReport:
    """Write the merged model, tensor by tensor, with all that its folder needs to be loaded."""
    report = started(sources, task, dtype)
    with complete_folder(out, overwrite=overwrite) as folder:
        shapes = {name: _target(name, sources, dtype) for name in (*sources.names, *sources.kept)}
        with ShardWriter(folder, shapes, shard_bytes) as writer:
            for name, tensor in _results(sources, task, dtype, report):
                writer.write(name, tensor)
                del tensor
        assert isinstance(sources.origin, ModelFolder)
        copy_companions(sources.origin.path, folder, dtype)
        write_text(folder / "README.md", model_card(report))
        write_json(
            folder / "merge.json", {k: v for k, v in report.to_dict().items() if k not in _UNKNOWN_YET}
        )
    return report


_UNKNOWN_YET = ("seconds", "path")  # until the folder is there


def started(sources: Sources, task: Task, dtype: torch.dtype | None) -> MergeReport:
    """Return the report of a merge that begins."""
    models = ([] if sources.base is None else [sources.base]) + list(sources.models)
    results = [_target(name, sources, dtype) for name in sources.names]
    return MergeReport(
        method=task.rule.name,
        options=task.options,
        models=[model.label for model in sources.models],
        base="" if sources.base is None else sources.base.label,
        weights=list(sources.weights),
        seed=sources.seed,
        dtype=_types(results),
        inputs=_types([model.tensors[name] for model in models for name in sources.names]),
    )


def copy_companions(origin: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy what a model needs beside its weights: configuration, tokenizer, generation settings."""
    found = {path for pattern in _COMPANIONS for path in origin.glob(pattern)}
    for path in sorted(found):
        if path.is_dir():
            _copy_settings(path, folder / path.name)
        elif path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    if dtype is not None and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = _name(dtype)
        (folder / "config.json").unlink()
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _copy_settings(origin: Path, target: Path) -> None:
    target.mkdir()
    for path in origin.glob("*.json"):
        shutil.copyfile(path, target / path.name)


def _results(
    sources: Sources, task: Task, dtype: torch.dtype | None, report: MergeReport
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in the type in which it is stored, and fill the report."""
    for name, tensor, origin in task.merged(sources):
        report.rows.append({"tensor": name, "change": change(task.rule.name, name, tensor, origin)})
        yield name, _cast(name, tensor.detach(), _target(name, sources, dtype).dtype, report)
        del tensor, origin  # before the next ones are read
    for name in sources.kept:
        report.taken.append(name)
        report.bytes += sources.taken(name).nbytes
        yield name, sources.taken(name)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, report: MergeReport) -> Tensor:
    result = tensor.to(dtype)
    if dtype == torch.float16 and bool((result.isinf() & tensor.isfinite()).any()):
        raise InvalidOption(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, which float16 cannot hold"
        )
    report.bytes += result.nbytes
    return result


def _target(name: str, sources: Sources, dtype: torch.dtype | None) -> Shape:
    own = sources.origin.tensors[name]
    return Shape(own.shape, dtype if dtype is not None and own.is_merged else own.dtype)


def change(rule: str, name: str, tensor: Tensor, origin: Tensor) -> float:
    """Return the norm of what a merge changed over the norm of what was there; of zeros the norm itself.

    Raises:
        Incompatible: the result is not finite, and not what was there.

    Example:
        >>> change("linear", "w", torch.tensor([3.0, 6.0]), torch.tensor([3.0, 2.0]))
        1.1094...
    """
    size, moved = _norms(tensor, origin)
    if not math.isfinite(size + moved):
        _require_finite(rule, name, tensor, origin)
        finite = origin.isfinite()  # of which only the sum of squares was too large
        size, moved = _norms(tensor[finite].double(), origin[finite].double())
    return moved / size if size else moved


def _norms(tensor: Tensor, origin: Tensor) -> tuple[float, float]:
    """Return |origin| and |tensor - origin|, without a third tensor of that size."""
    parts = zip(tensor.reshape(-1).split(_CHUNK), origin.reshape(-1).split(_CHUNK), strict=True)
    squares = torch.zeros(2, dtype=torch.float64)
    for new, old in parts:
        norms = [torch.linalg.vector_norm(part) for part in (old, new - old)]
        squares += torch.stack(norms).double().cpu().square()
    size, moved = squares.sqrt().tolist()
    return size, moved


def _require_finite(rule: str, name: str, tensor: Tensor, origin: Tensor) -> None:
    if not bool(tensor.isfinite().all()) and not torch.equal(tensor, origin):
        kind = "NaN" if bool(tensor.isnan().any()) else "infinities"
        raise Incompatible(
            f"{rule} gives {kind} in {name}: a model holds infinities, or values too large to add"
        )


def _types(shapes: list[Shape]) -> str:
    return "+".join(sorted({_name(shape.dtype) for shape in shapes}))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
