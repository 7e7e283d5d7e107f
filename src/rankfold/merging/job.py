"""Merging models and adapters: one call for modules in memory, folders of models, and adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import catalogue
from ..errors import InvalidOption
from ..formats.changes import Changes
from ..formats.files import refuse_existing
from .adapters import gathered, merge_changes
from .folder import dtype_named, merge_folders, merge_modules
from .models import ModelFolder
from .report import MergeReport
from .sources import Sources
from .task import Task

SHARD = 5 * 10**9

Mergeable = nn.Module | str | Path | Changes


def merge(
    models: Mergeable | Sequence[Mergeable],
    method: str,
    *,
    base: nn.Module | str | Path | None = None,
    weights: Sequence[float] | None = None,
    adapters: Sequence[str] | None = None,
    data: Any = None,
    loss: Callable[..., Tensor] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    rank: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    shard_bytes: int = SHARD,
    progress: bool = True,
    report: Callable[[MergeReport], object] | None = None,
    **options: Any,
) -> Any:
    """Merge models of one architecture, or adapters of one base, into one.

    Rules compute in float32, or in float64 where a tensor is stored so; tensors of integers are taken from
    the base, and must be alike where there is none. Tied weights are merged once.

    Args:
        models: modules, folders of safetensors files, or adapters (what `read_changes` reads, or `Changes`);
            or one adapted model, whose adapters are named by `adapters`.
        method: name of a rule in the catalogue, axis "merge".
        base: the model from which all were trained: a module or a folder. Adapters need it only for modules
            that they trained whole.
        weights: one for each model; None gives 1 to each.
        adapters: names of adapters in the one model given; None takes all that it has.
        data: batches for rules that measure, or one set for each model.
        loss: of a model and a batch, for such rules.
        seed: of every random choice.
        out: the folder to write; needed for folders of models, optional for adapters. It appears complete or
            not at all.
        dtype: of the result: "float32", "bfloat16", "float16" or "float64"; None keeps the base's, or the
            first model's where there is no base.
        rank: of merged adapters; None keeps the sum of their ranks, which is exact for linear rules.
        strict: refuse adapters that do not all change the same weights or name different bases.
        overwrite: replace a folder that is there.
        shard_bytes: largest file of tensors.
        progress: show a bar over the tensors.
        report: called with the `MergeReport` at the end.
        options: of the method.

    Returns:
        Of modules a new module, a copy of the base, or of the first, with merged weights. Of folders the
        folder written. Of adapters their merged `Changes`.

    Raises:
        UnknownMethod: there is no such rule.
        InvalidOption: an option, the weights, or what is given together makes no sense.
        Incompatible: the models differ in architecture or vocabulary, a base is missing, a weight holds NaN,
            or adapters change other shapes.
        FormatError: a file is truncated.
        OutputExists: the folder is there.

    Example:
        >>> import torch, rankfold as rf
        >>> models = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
        >>> merged = rf.merge(models, "linear", weights=[1, 3], progress=False)
        >>> expected = (models[0].weight + 3 * models[1].weight) / 4
        >>> bool(torch.allclose(merged.weight, expected))
        True
    """
    start = time.perf_counter()
    rule = catalogue.get("merge", method)
    task = Task(rule, rule.checked(options), progress)
    kind, target = dtype_named(dtype), None if out is None else Path(out)
    if target is not None:
        refuse_existing(target, overwrite=overwrite)  # before anything large is read
    settings: dict[str, Any] = {"base": base, "weights": weights, "data": data, "loss": loss, "seed": seed}
    given = gathered(models, adapters, base)
    result: nn.Module | Path | Changes
    if given is not None:
        result, told = merge_changes(given, task, dtype=kind, rank=rank, strict=strict, **settings)
        if target is not None:
            result.save(target, overwrite=overwrite)
    else:
        _refuse_rank(rank, strict)
        several = [models] if isinstance(models, nn.Module | str | Path) else models
        with Sources(several, progress=progress, **settings) as sources:  # type: ignore[arg-type]  # no changes
            task.check(sources.count, sources.has_base)
            if _into_folder(sources, target):
                assert target is not None
                told = merge_folders(sources, task, kind, target, overwrite, shard_bytes)
                result = target
            else:
                result, told = merge_modules(sources, task, kind)
    told.seconds, told.path = time.perf_counter() - start, "" if target is None else str(target)
    if report is not None:
        report(told)
    return result


def _into_folder(sources: Sources, out: Path | None) -> bool:
    folder = isinstance(sources.origin, ModelFolder)
    if folder and out is None:
        raise InvalidOption("folders of models are merged into a folder; pass out= (--out)")
    if not folder and out is not None:
        raise InvalidOption(
            "modules are merged into a module, which out= does not write; save what is returned"
        )
    return folder


def _refuse_rank(rank: int | None, strict: bool) -> None:
    if rank is not None or strict:
        raise InvalidOption("rank= and strict= are of merged adapters, and these are models")
