"""Merging models into a module, or into a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
from ..formats.files import complete_folder, read_json, write_json, write_text
from .card import model_card
from .models import ModelFolder, Shape
from .norms import Norms, norms
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
    tensors = dict(_merged(sources, task, dtype, report)) | dict(_taken(sources, report))
    return sources.module(tensors), report


def merge_folders(
    sources: Sources, task: Task, dtype: torch.dtype | None, out: Path, overwrite: bool, shard_bytes: int
) -> MergeReport:
    """Write the merged model, tensor by tensor, with all that its folder needs to be loaded."""
    report = started(sources, task, dtype)
    with complete_folder(out, overwrite=overwrite) as folder:
        shapes = {name: _target(name, sources, dtype) for name in (*sources.names, *sources.kept)}
        with ShardWriter(folder, shapes, shard_bytes) as writer:
            if task.rule.traits["linear"]:
                _stream(sources, task, dtype, report, writer)
            else:
                _write(_merged(sources, task, dtype, report), writer)
            _write(_taken(sources, report), writer)
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


_Named = Iterator[tuple[str, Tensor]]


def _write(tensors: _Named, writer: ShardWriter) -> None:
    for name, tensor in tensors:
        writer.write(name, tensor)
        del tensor  # before the next one is read


def _stream(
    sources: Sources, task: Task, dtype: torch.dtype | None, report: MergeReport, writer: ShardWriter
) -> None:
    """Merge and write piece by piece; a tensor that is not finite somewhere is looked at as a whole.

    NaN in a model is NaN in the sum, and so the norms of the report find it without a pass of their own.
    """
    with task.bar(len(sources.names)) as step:
        for name in sources.names:
            kind, found = _target(name, sources, dtype).dtype, Norms()
            if writer.write_flat(name, _finite(task, sources, name, kind, found)):
                _tell(report, name, found.ratio, writer.tensors[name])
            else:
                _, tensor, origin = task.found(sources.parts(name))
                _tell(report, name, change(task.rule.name, name, tensor, origin), writer.tensors[name])
                writer.write(name, _cast(name, tensor, kind))
            step()


def _finite(task: Task, sources: Sources, name: str, dtype: torch.dtype, found: Norms) -> Iterator[Tensor]:
    """Yield the pieces of a tensor up to the first that is not finite."""
    for tensor, origin in task.pieces(sources, name):
        if not found.add(tensor, origin) or _overflows(result := tensor.to(dtype), tensor):
            return
        yield result


def _merged(sources: Sources, task: Task, dtype: torch.dtype | None, report: MergeReport) -> _Named:
    """Yield every merged tensor in the type in which it is stored, and fill the report."""
    for name, tensor, origin in task.merged(sources):
        target = _target(name, sources, dtype)
        _tell(report, name, change(task.rule.name, name, tensor, origin), target)
        yield name, _cast(name, tensor.detach(), target.dtype)
        del tensor, origin  # before the next ones are read


def _tell(report: MergeReport, name: str, change: float, stored: Shape) -> None:
    report.rows.append({"tensor": name, "change": change})
    report.bytes += torch.Size(stored.shape).numel() * stored.dtype.itemsize


def _taken(sources: Sources, report: MergeReport) -> _Named:
    """Yield the tensors that are not merged."""
    for name in sources.kept:
        report.taken.append(name)
        report.bytes += sources.taken(name).nbytes
        yield name, sources.taken(name)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    result = tensor.to(dtype)
    if _overflows(result, tensor):
        raise InvalidOption(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, which float16 cannot hold"
        )
    return result


def _overflows(result: Tensor, tensor: Tensor) -> bool:
    return result.dtype == torch.float16 and bool((result.isinf() & tensor.isfinite()).any())


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
    found = norms(tensor, origin)
    if not found.are_finite:
        _require_finite(rule, name, tensor, origin)
        finite = origin.isfinite()  # of which only the sum of squares was too large
        found = norms(tensor[finite].double(), origin[finite].double())
    return found.ratio


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
