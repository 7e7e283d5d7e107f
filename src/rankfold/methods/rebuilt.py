"""Reading the change that a saved adapter makes, beside its base or, where it is not needed, without it.

Without a base, the adapter is built on layers of the recorded shapes whose weights are NaN everywhere: a
change that holds no NaN then cannot depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, Incompatible, NotDense, RankfoldError
from ..formats import Changes, native
from ..formats.change import Pair, dense_change, exact_change
from ..formats.readers import native_reader
from ..formats.readers_files import check_finite
from ..formats.readers_pairs import whole_pair
from ..weights import Weight, adopt_ranks, adopt_selections
from .persist import check_ranks, rebuild
from .prepare import EVERYTHING, Prepared
from .registry import structure_named

_LARGEST_SIDE = 2**24  # of a weight; no layer has a longer one


@native_reader
def read_native(folder: Path, model: nn.Module | None) -> Changes:
    """Read the changes of an adapter folder.

    Args:
        folder: as `save` writes it.
        model: the base model, which is not changed; without it, changes that depend on it are refused.

    Raises:
        FormatError: the folder is truncated or changed, or holds NaN.
        NotDense: the adapter acts on activations or differs from token to token.
        Incompatible: everything in the model was trained; or the change depends on the base, and there is
            none.
        BaseMismatch: the adapter was made for another base.
    """
    adapter = native.read(folder)
    record = adapter.record
    check_ranks(record, adapter.tensors)
    for key, tensor in adapter.tensors.items():
        check_finite(f"{folder}: {key}", tensor)
    if record["train"] == [EVERYTHING] or record.get("removable") is False:
        raise Incompatible(f"{folder}: everything in the model was trained, so there is no change of a base")
    method = _method_of(record)
    if structure_named(method).traits["activations"]:
        raise NotDense(f"{folder}: {method} acts on activations, which is no change of a weight")
    host = _skeleton(record, adapter.tensors) if model is None else model
    prepared = _prepared(host, record, adapter.tensors, folder, with_base=model is not None)
    if model is not None:
        native.check_base(record, native.anchors(model, prepared.adapter.paths, prepared.layers))
    pairs = {
        path: _pair(path, expression, prepared, model is not None)
        for path, expression in prepared.expressions.items()
    }
    forms = {path: _form(path, record["base"]["weights"].get(path, {})) for path in pairs}
    kinds = {path: kind for path, (kind, _) in forms.items()}
    windows = {path: window for path, (_, window) in forms.items() if window}
    whole = {
        key.removeprefix("whole:"): value
        for key, value in adapter.tensors.items()
        if key.startswith("whole:")
    }
    base = str(record["base"].get("name") or "")
    return Changes(pairs, kinds, windows, whole, base, f"rankfold {method}", tied=_tied(record, pairs))


def _tied(record: Mapping[str, Any], pairs: Mapping[str, Pair]) -> dict[str, str]:
    known = record.get("tied", {})
    if not isinstance(known, dict):
        raise FormatError("the adapter's record does not describe which weights are tied")
    return {path: str(other) for path, other in known.items() if path in pairs}


def _form(path: str, known: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """Return the recorded kind and window of a weight."""
    kind, window = known.get("kind", "linear"), known.get("window", [])
    if not isinstance(kind, str) or not isinstance(window, list) or len(window) > 3:
        raise FormatError(f"the adapter's record does not describe {path}")
    if not all(type(size) is int and size > 0 for size in window):
        raise FormatError(f"the adapter's record gives {path} the impossible window {window}")
    return kind, tuple(window)


def _method_of(record: Mapping[str, Any]) -> str:
    structure = record["recipe"].get("structure")
    if not isinstance(structure, list) or not structure or not isinstance(structure[0], str):
        raise FormatError("the adapter's record names no method")
    return structure[0]


def _prepared(
    host: nn.Module,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    with_base: bool,
) -> Prepared:
    """Build an adapter's expressions beside a model and fill them, without putting them in place."""
    try:
        prepared = rebuild(host, {**record, "train": []}, "read")
    except RankfoldError as error:
        if with_base:
            raise
        raise Incompatible(f"{folder} cannot be read without its base; pass model= ({error})") from None
    if prepared.adapter.scratch:
        raise Incompatible(f"{folder}: the weights themselves were trained, so there is no change of a base")
    if prepared.adapter.record["plan"] != record["plan"]:
        raise FormatError(
            f"{folder}: this version of Rankfold plans the shared indices differently; it cannot read them"
        )
    _fill_shared(prepared, tensors)
    for path, expression in prepared.expressions.items():
        leaves = native.leaves_of(path, tensors)
        adopt_selections(expression, leaves)
        adopt_ranks(expression, leaves)
        native.fill_expression(path, expression, leaves)
        expression.eval()
    return prepared


@torch.no_grad()
def _fill_shared(prepared: Prepared, tensors: Mapping[str, Tensor]) -> None:
    known = {key: tuple(tensor.shape) for key, tensor in prepared.shared.items()}
    start = "shared:"
    found = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    native.check_names(known, found)
    for key, tensor in prepared.shared.items():
        tensor.copy_(found[key])


@torch.no_grad()
def _pair(path: str, expression: Weight, prepared: Prepared, with_base: bool) -> Pair:
    if not expression.has_matrix():
        raise NotDense(f"{path}: the change differs from token to token, which no low-rank pair can hold")
    pair = exact_change(expression)
    if pair is None or pair[0].shape[1] > min(expression.shape):
        pair = whole_pair(dense_change(expression, prepared.layers[path].matrix()))
    if not with_base and not all(bool(factor.isfinite().all()) for factor in pair):
        raise Incompatible(f"{path}: the change depends on the base weight; pass model=")
    return pair[0].detach(), pair[1].detach()


# A model of the recorded shapes -----------------------------------------------------------------------


def _skeleton(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a model that has a layer of the recorded shape at every target, of NaN that take no memory.

    Raises:
        FormatError: the record describes no such layers.
    """
    double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if double else torch.float32
    root = nn.Module()
    try:
        for path in record["targets"]:
            _put_layer(root, path, _layer(path, record["base"]["weights"][path], dtype))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise FormatError(f"the adapter's record does not describe its base: {error!r}") from None
    return root


def _layer(path: str, known: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    rows, columns = known["shape"]
    if not (0 < rows <= _LARGEST_SIDE and 0 < columns <= _LARGEST_SIDE):
        raise ValueError(f"no weight is {rows}x{columns}")
    layer = _bare(rows, columns, *_form(path, known))
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    layer.weight = nn.Parameter(torch.full((), math.nan, dtype=dtype).expand(shape), requires_grad=False)
    return layer


def _bare(rows: int, columns: int, kind: str, window: tuple[int, ...]) -> nn.Module:
    """Return a layer of a kind without memory; groups do not matter to a matrix."""
    if kind == "embedding":
        return nn.Embedding(rows, columns, device="meta")
    if not kind.endswith("convolution"):
        return nn.Linear(columns, rows, bias=False, device="meta")
    channels, rest = divmod(columns, math.prod(window))
    if rest or not channels:
        raise ValueError(f"the window {window} does not divide {columns} columns")
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(window)]
    return convolution(channels, rows, window, bias=False, device="meta")  # type: ignore[arg-type]


def _put_layer(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]  # type: ignore[assignment]
    root.add_module(name, layer)
