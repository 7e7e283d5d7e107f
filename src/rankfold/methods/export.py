"""Exporting with data: the inputs of every weight are seen first, and weigh what is approximated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidOption
from ..formats import Report
from ..formats import export as write
from ..formats.export import alone, check_options
from ..layers import Adaptation, Adapter, StructuredEmbedding, require
from ..statistics import Statistics, collect


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "peft",
    *,
    name: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    data: Iterable[Any] | Statistics | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    native: bool = True,
    dtype: str = "f32",
    overwrite: bool = False,
    drop_whole: bool = False,
    progress: bool = True,
) -> Report:
    """Write an adapter in another tool's form; the model is not changed.

    Changes of low rank are written exactly (a residual start of rank r as plain LoRA of rank 2 r), others by
    their best approximation, whose error is reported for every weight and never hidden. With data, an
    approximation X of a change D is the one whose outputs are nearest on inputs of Gram matrix C:

        X = argmin over rank r of ||(D - X) C^(1/2)||_F

    Args:
        model: an adapted model.
        path: the folder to write; of "gguf" the folder, or the file where it ends in .gguf.
        format: "peft" (the method itself where peft stores the same map: LoRA, DoRA, VeRA, LoHa, LoKr, HRA,
            HiRA, MiSS, OFT, GraLoRA; else LoRA), "portable" (the plain LoRA that every server
            reads alike), "gguf" (plain LoRA as llama.cpp reads it) or "dense" (a stock checkpoint with the
            change folded in).
        name: of the adapter; None takes the only or the active one.
        rank: of the approximation; an exact change of higher rank is cut to it.
        max_error: largest relative error of a weight's change, in (0, 1), in the metric that is used;
            chooses the rank.
        data: batches as `collect` takes them, or statistics that hold "input_gram"; they weigh the
            approximation. Embeddings, which have no such inputs, are approximated in the Frobenius norm.
        loss: `loss(model, batch)` that runs the model, where `model(**batch)` does not.
        native: False writes LoRA in peft's format whatever the method.
        dtype: of the numbers in a GGUF file, "f32" or "f16".
        overwrite: replace what is there.
        drop_whole: leave modules trained whole out of the portable form and GGUF, which cannot hold them.
        progress: whether to show a bar on a terminal while data are seen.

    Returns:
        What was written, with rank and errors of every weight.

    Raises:
        Incompatible: the form cannot hold the adapter.
        NotDense: the method acts on activations, or differs from token to token.
        InvalidOption: a change is not of low rank and neither `rank` nor `max_error` is given, or both are.
        OutputExists: the folder is there.

    Example:
        >>> import tempfile, torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), "dora", rank=2, targets="0")
        >>> _ = torch.nn.init.normal_(model[0].expression.leaf("up").value)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = rf.export(model, folder, "portable", rank=2, data=[torch.ones(1, 8)], progress=False)
        >>> report.largest_output_error < 1e-5 < report.largest_error
        True
    """
    check_options(format, rank, max_error, data=data is not None, dtype=dtype)
    grams: dict[str, Tensor] = {}
    if data is not None:
        grams = input_grams(model, data, name=name, loss=loss, progress=progress)
    return write(
        model,
        path,
        format,
        name=name,
        rank=rank,
        max_error=max_error,
        grams=grams,
        native=native,
        dtype=dtype,
        overwrite=overwrite,
        drop_whole=drop_whole,
    )


def input_grams(
    model: nn.Module,
    data: Iterable[Any] | Statistics,
    *,
    name: str | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Return the Gram matrix (in, in) of the inputs of every weight that an adapter changes, by path.

    Args:
        model: an adapted model, which runs with this adapter alone.
        data: batches, or statistics that hold "input_gram".
        name: of the adapter; None takes the only or the active one.
        loss: as for `export`.
        progress: as for `export`.

    Returns:
        The matrices; weights that share an input share one tensor. Embeddings, and weights that no token
        reached, have none.

    Raises:
        InvalidOption: statistics do not cover a weight.
    """
    adaptation = require(model)
    adapter = adaptation.adapter(name)
    paths = [path for path in _layers(adaptation, adapter) if not _is_looked_up(adaptation, path)]
    if isinstance(data, Statistics):
        data.check(model)
        missing = [path for path in paths if path not in data]
        if missing:
            raise InvalidOption(f"the statistics given do not cover {missing[0]} ({len(missing)} missing)")
        found = data
    elif not paths:
        return {}
    else:
        with alone(adaptation, adapter), torch.enable_grad():
            found = collect(model, data, "input_gram", targets=paths, loss=loss, progress=progress)
    return _shared(found, paths)


def _layers(adaptation: Adaptation, adapter: Adapter) -> list[str]:
    return list(adaptation.expressions(adapter.name))


def _is_looked_up(adaptation: Adaptation, path: str) -> bool:
    return isinstance(adaptation.layers[path], StructuredEmbedding)


def _shared(found: Statistics, paths: list[str]) -> dict[str, Tensor]:
    """Return one tensor for all weights that have one input."""
    leaders: dict[str, Tensor] = {}
    result = {}
    for path in paths:
        entry = found[path]
        if entry.tokens:
            if entry.leader not in leaders:
                leaders[entry.leader] = entry.get("input_gram")
            result[path] = leaders[entry.leader]
    return result
