"""Writing an adapter in the forms that other tools read."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption, NotDense
from ..layers import (
    Adaptation,
    Adapter,
    StructuredConv,
    StructuredEmbedding,
    StructuredLayer,
    StructuredTransposedLinear,
    fold,
    require,
)
from ..weights import Moved, Pair, Pooled, Sum, Weight
from . import card, peft, portable
from .change import Pair as Factors
from .change import approximated, dense_change, direction_of, exact_change, truncated
from .files import complete_folder, write_text
from .report import Report

FORMATS = ("peft", "portable", "dense")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "peft",
    *,
    name: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    overwrite: bool = False,
    drop_whole: bool = False,
) -> Report:
    """Write an adapter in another tool's form; the model is not changed.

    Changes of low rank are written exactly (a residual start of rank r as plain LoRA of rank 2 r), others by
    their best approximation, whose error is reported for every weight and never hidden.

    Args:
        model: an adapted model.
        path: the folder to write.
        format: "peft" (LoRA, DoRA or VeRA as peft stores them), "portable" (the plain LoRA that every server
            reads alike) or "dense" (a stock checkpoint with the change folded in).
        name: of the adapter; None takes the only or the active one.
        rank: of the approximation; an exact change of higher rank is cut to it.
        max_error: largest relative Frobenius error of a weight's change, in (0, 1); chooses the rank.
        overwrite: replace a folder that is there.
        drop_whole: leave modules trained whole out of the portable form, which cannot hold them.

    Raises:
        Incompatible: the form cannot hold the adapter.
        InvalidOption: a change is not of low rank and neither `rank` nor `max_error` is given, or both are.
        OutputExists: the folder is there.
    """
    if format not in FORMATS:
        raise InvalidOption(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if rank is not None and rank < 1:
        raise InvalidOption(f"rank must be at least 1, not {rank}")
    if max_error is not None and not 0 < max_error < 1:
        raise InvalidOption(f"max_error must lie between 0 and 1, not {max_error}")
    if format == "dense" and (rank, max_error) != (None, None):
        raise InvalidOption("the dense form is exact: leave rank= and max_error= away")
    if rank is not None and max_error is not None:
        raise InvalidOption("rank= and max_error= both choose the rank; pass one of them")
    adaptation = require(model)
    adapter = adaptation.adapter(name)
    if format != "dense" and (adapter.scratch or adapter.record.get("train") == ["all"]):
        raise Incompatible(
            f"everything in the model was trained, and the {format} form holds changes of a known base; use "
            'format="dense"'
        )
    report = Report(format, str(path))
    with complete_folder(path, overwrite=overwrite) as folder, _alone(adaptation, adapter):
        if format == "dense":
            _write_dense(model, folder, report, adapter)
        else:
            writer = _write_peft if format == "peft" else _write_portable
            writer(adaptation, adapter, folder, report, rank, max_error, drop_whole)
            _write_card(adaptation, adapter, folder, report)
    return report


@contextlib.contextmanager
def _alone(adaptation: Adaptation, adapter: Adapter) -> Iterator[None]:
    """Within the block the adapter stands on the base itself, not on another adapter."""
    active = adaptation.active
    if active == (adapter.name,):
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in adaptation.root.parameters()]
    adaptation.use([adapter.name])
    try:
        yield
    finally:
        adaptation.use(active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _write_dense(model: nn.Module, folder: Path, report: Report, adapter: Adapter) -> None:
    plain = fold(copy.deepcopy(model))
    report.rows += [{"weight": p, "rank": None, "exact": True, "error": 0.0} for p in adapter.paths]
    save = getattr(plain, "save_pretrained", None)
    if callable(save):
        save(folder)
    else:
        from safetensors.torch import save_model

        save_model(plain, str(folder / "model.safetensors"))


def _write_card(adaptation: Adaptation, adapter: Adapter, folder: Path, report: Report) -> None:
    notes = {"format": report.format, "largest relative error": f"{report.largest_error:.3g}"}
    base = {"name": _base_name(adaptation.root), "class": type(adaptation.root).__name__}
    write_text(folder / "README.md", card.model_card({**adapter.record, "base": base}, notes, library="peft"))


def _base_name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _options(adaptation: Adaptation) -> dict[str, Any]:
    root = adaptation.root
    task = next((task for suffix, task in _TASKS.items() if type(root).__name__.endswith(suffix)), None)
    revision = getattr(getattr(root, "config", None), "_commit_hash", None)
    return {"base_model_name_or_path": _base_name(root) or None, "task_type": task, "revision": revision}


# peft -------------------------------------------------------------------------------------------------


def _write_peft(
    adaptation: Adaptation,
    adapter: Adapter,
    folder: Path,
    report: Report,
    rank: int | None,
    max_error: float | None,
    _: bool,
) -> None:
    expressions = _checked(adaptation, adapter, "peft")
    if rank is None and max_error is None and (vera := _as_vera(adaptation, adapter, expressions)):
        written = vera
        report.rows += [_row(p, written.rank(p)) for p in expressions]
    else:
        written = _as_lora(adaptation, expressions, report, rank, max_error)
    written.whole = {k: v.detach() for k, v in adaptation.whole(adapter.name).items()}
    refuse_tied(adaptation.root, written.whole.keys())
    transposed = [isinstance(adaptation.layers[path], StructuredTransposedLinear) for path in expressions]
    written.options |= _options(adaptation) | {"fan_in_fan_out": any(transposed)}
    written.options |= _unambiguous(adaptation.root, list(expressions))
    if written.whole:
        written.options["modules_to_save"] = sorted({str(m) for m in adapter.record.get("train", ())})
    peft.write(folder, written)


def refuse_tied(model: nn.Module, whole: Set[str]) -> None:
    """Refuse a tensor trained whole that another module shares; peft unties the two at loading.

    Raises:
        Incompatible: there is one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for key, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(key)
    for key in sorted(whole & parameters.keys()):
        others = [name for name in names[id(parameters[key])] if name != key]
        if others:
            raise Incompatible(f"{key}, trained whole, shares its tensor with {others[0]}; peft unties them")


def _unambiguous(model: nn.Module, paths: list[str]) -> dict[str, Any]:
    """Return targets as one pattern where peft would take a path for the end of another one, too."""
    names = {name for name, _ in model.named_modules() if name not in paths}
    if not any(name.endswith(f".{path}") for path in paths for name in names):
        return {}
    return {"target_modules": "|".join(re.escape(path) for path in sorted(paths))}


def _row(path: str, rank: int, error: float = 0.0, exact: bool = True) -> dict[str, Any]:
    return {"weight": path, "rank": rank, "exact": exact, "error": error}


def _checked(adaptation: Adaptation, adapter: Adapter, form: str) -> dict[str, Weight]:
    """Return the expressions, refusing what a LoRA file cannot say."""
    if adapter.branches:
        raise NotDense(f"{_method(adapter)} acts on activations, which no LoRA file can hold")
    expressions = adaptation.expressions(adapter.name)
    for path, expression in expressions.items():
        layer = adaptation.layers[path]
        if not expression.has_matrix():
            raise NotDense(
                f"{_method(adapter)} differs from token to token, which a plain LoRA file cannot hold"
            )
        if layer.materialised:
            raise Incompatible(
                f"{path}: the {form} form has no agreed names for projections of nn.MultiheadAttention"
            )
        if layer.op.groups > 1:
            raise Incompatible(
                f"{path}: peft's LoRA of a grouped convolution is another map; export format='dense'"
            )
    for path, layer in adaptation.layers.items():
        if layer._lender and layer._lender[0] in [adaptation.layers[p] for p in expressions]:
            raise Incompatible(
                f"{path} shares its tensor with an adapted weight, which a {form} file cannot say"
            )
    return expressions


def _method(adapter: Adapter) -> str:
    structure = adapter.record.get("recipe", {}).get("structure", [adapter.name])
    return str(structure[0])


def kind_and_window(layer: StructuredLayer) -> tuple[str, tuple[int, ...]]:
    """Return what peft's format calls a layer: linear, embedding or convolution; and the last's window."""
    if isinstance(layer, StructuredEmbedding):
        return "embedding", ()
    if isinstance(layer, StructuredConv):
        return "convolution", layer.op.window  # type: ignore[attr-defined]
    return "linear", ()


def _as_vera(
    adaptation: Adaptation, adapter: Adapter, expressions: Mapping[str, Weight]
) -> peft.PeftAdapter | None:
    if set(adapter.shared) != {"up", "down"} or not all(_is_vera(e) for e in expressions.values()):
        return None
    if any(kind_and_window(adaptation.layers[p])[0] != "linear" for p in expressions):
        return None
    layers = {
        p: {leaf: e.leaf(leaf).tensor().detach() for leaf in ("b", "d")} for p, e in expressions.items()
    }
    if len({leaves["d"].shape for leaves in layers.values()}) > 1:
        return None  # peft's VeRA has one rank for all layers
    shared = {key: getattr(adaptation.root, attribute) for key, attribute in adapter.shared.items()}
    return peft.PeftAdapter("VERA", layers, dict.fromkeys(layers, "linear"), shared=shared)


def _is_vera(expression: Weight) -> bool:
    names = {leaf.name for leaf in expression.leaves()}
    return (
        names == {"W0", "b", "up", "d", "down"}
        and sum(isinstance(x, Pooled) for x in expression.leaves()) == 2
    )


def _as_lora(
    adaptation: Adaptation,
    expressions: Mapping[str, Weight],
    report: Report,
    rank: int | None,
    max_error: float | None,
) -> peft.PeftAdapter:
    written = peft.PeftAdapter("LORA", {}, {})
    for path, expression in expressions.items():
        layer = adaptation.layers[path]
        leaves, alpha, row = _lora_leaves(path, expression, layer, rank, max_error)
        written.layers[path], written.alphas[path] = leaves, alpha
        written.kinds[path], written.windows[path] = kind_and_window(layer)
        report.rows.append(row)
    return written


def _lora_leaves(
    path: str, expression: Weight, layer: StructuredLayer, rank: int | None, max_error: float | None
) -> tuple[dict[str, Tensor], float, dict[str, Any]]:
    """Return the leaves of one layer on disk, its alpha, and the report's row."""
    normalised = direction_of(expression)
    if normalised is not None and rank is None and max_error is None:
        direction, magnitude = normalised
        pair = exact_change(direction)
        if pair is not None:
            leaves = {"up": pair[0], "down": pair[1], "magnitude": magnitude}
            return leaves, float(pair[0].shape[1]), _row(path, pair[0].shape[1])
    single = _single_pair(expression) if rank is None and max_error is None else None
    if single is not None:
        up, down = single.up.dense().detach(), single.down.dense().detach()
        return {"up": up, "down": down}, single.scale * down.shape[0], _row(path, down.shape[0])
    pair, row = change_of(path, expression, layer, rank, max_error)
    return {"up": pair[0], "down": pair[1]}, float(pair[0].shape[1]), row


def _single_pair(expression: Weight) -> Pair | None:
    """Return the pair of W0 plus one plain trained product, whose alpha can be kept; else None."""
    pairs, leaves = list(expression.pairs()), list(expression.leaves())
    if len(pairs) != 1 or pairs[0].gate is not None or len(pairs[0].up.shape) != 2 or len(leaves) != 3:
        return None
    if any(isinstance(leaf, Moved) for leaf in leaves):  # has taken in changes of its own
        return None
    return pairs[0] if isinstance(expression, Sum) else None


@torch.no_grad()
def change_of(
    path: str, expression: Weight, layer: StructuredLayer, rank: int | None, max_error: float | None
) -> tuple[Factors, dict[str, Any]]:
    """Return up and down of a weight's change, scale folded in, and the report's row.

    Raises:
        InvalidOption: the change is not of low rank and neither `rank` nor `max_error` is given.
    """
    exact = exact_change(expression)
    if exact is not None:
        full = exact[0].shape[1]
        if max_error is None and (rank is None or rank >= full):
            return exact, _row(path, full)
        pair, error = truncated(exact, rank, max_error)
    elif rank is None and max_error is None:
        raise InvalidOption(
            f"{path}: this change is not of low rank; pass rank= or max_error= for its best approximation"
        )
    else:
        pair, error = approximated(dense_change(expression, layer.matrix()), rank, max_error)
    return pair, _row(path, pair[0].shape[1], error, exact=error == 0)


# portable ---------------------------------------------------------------------------------------------


def _write_portable(
    adaptation: Adaptation,
    adapter: Adapter,
    folder: Path,
    report: Report,
    rank: int | None,
    max_error: float | None,
    drop_whole: bool,
) -> None:
    expressions = _checked(adaptation, adapter, "portable")
    for path in expressions:
        if kind_and_window(adaptation.layers[path])[0] != "linear":
            raise Incompatible(
                f"{path}: servers read LoRA of linear layers only; leave it out of targets or export dense"
            )
        if isinstance(adaptation.layers[path], StructuredTransposedLinear):
            raise Incompatible(
                f"{path}: servers want fan_in_fan_out unset, which transformers' Conv1D layers need"
            )
    whole = sorted(adaptation.whole(adapter.name))
    if whole and not drop_whole:
        raise Incompatible(
            f"the portable form cannot hold {whole[0]}, which was trained whole; pass drop_whole=True"
        )
    report.dropped += whole
    pairs = {}
    for path, expression in expressions.items():
        pairs[path], row = change_of(path, expression, adaptation.layers[path], rank, max_error)
        report.rows.append(row)
    portable.write(folder, pairs, _options(adaptation))
