"""Writing an adapter in the forms that other tools read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
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
from ..weights import Pair, Pooled, Weight, term_is_dense
from . import card, peft, portable
from .change import Pair as Factors
from .change import (
    approximated,
    dense_change,
    direction_of,
    exact_change,
    smallest_rank,
    tail_error,
    truncated,
)
from .files import complete_folder
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

    Changes of low rank are written exactly (a residual start of rank r as plain LoRA of rank 2 r), others by their
    best approximation, whose error is reported for every weight and never hidden.

    Args:
        model: an adapted model.
        path: the folder to write.
        format: "peft" (LoRA, DoRA or VeRA as peft stores them), "portable" (the plain LoRA that every server reads
            alike) or "dense" (a stock checkpoint with the change folded in).
        name: of the adapter; None takes the only or the active one.
        rank: of the approximation; an exact change of higher rank is cut to it.
        max_error: largest relative Frobenius error of a weight's change, in (0, 1); chooses the rank.
        overwrite: replace a folder that is there.
        drop_whole: leave modules trained whole out of the portable form, which cannot hold them.

    Raises:
        Incompatible: the form cannot hold the adapter.
        InvalidOption: a change is not of low rank and neither `rank` nor `max_error` is given.
        OutputExists: the folder is there.
    """
    if format not in FORMATS:
        raise InvalidOption(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if rank is not None and rank < 1:
        raise InvalidOption(f"rank must be at least 1, not {rank}")
    if max_error is not None and not 0 < max_error < 1:
        raise InvalidOption(f"max_error must lie between 0 and 1, not {max_error}")
    adaptation = require(model)
    adapter = adaptation.adapter(name)
    report = Report(format, str(path))
    with complete_folder(path, overwrite=overwrite) as folder:
        if format == "dense":
            _write_dense(model, adapter, folder, report)
        else:
            writer = _write_peft if format == "peft" else _write_portable
            writer(adaptation, adapter, folder, report, rank, max_error, drop_whole)
            _write_card(adaptation, adapter, folder, report)
    return report


def _write_dense(model: nn.Module, adapter: Adapter, folder: Path, report: Report) -> None:
    plain = copy.deepcopy(model)
    require(plain).use([adapter.name])
    fold(plain)
    report.rows += [{"weight": p, "rank": None, "exact": True, "error": 0.0} for p in adapter.paths]
    save = getattr(plain, "save_pretrained", None)
    if callable(save):
        save(folder)
    else:
        from safetensors.torch import save_model

        save_model(plain, str(folder / "model.safetensors"))


def _write_card(adaptation: Adaptation, adapter: Adapter, folder: Path, report: Report) -> None:
    notes = {"format": report.format, "largest relative error": f"{report.largest_error:.3g}"}
    record = {"base": {"name": _base_name(adaptation.root)}, **adapter.record}
    (folder / "README.md").write_text(
        card.model_card(record, notes).replace("library_name: rankfold", "library_name: peft")
    )


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
    written.options |= _options(adaptation)
    if written.whole:
        written.options["modules_to_save"] = sorted({str(m) for m in adapter.record.get("train", ())})
    peft.write(folder, written)


def _row(path: str, rank: int, error: float = 0.0, exact: bool = True) -> dict[str, Any]:
    return {"weight": path, "rank": rank, "exact": exact, "error": error}


def _checked(adaptation: Adaptation, adapter: Adapter, form: str) -> dict[str, Weight]:
    """Return the expressions, refusing what a LoRA file cannot say."""
    if adapter.branches:
        raise NotDense(f"{_method(adapter)} acts on activations, which no LoRA file can hold")
    expressions = adaptation.expressions(adapter.name)
    for path, expression in expressions.items():
        layer = adaptation.layers[path]
        if not term_is_dense(_still(expression)):
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


def _still(expression: Weight) -> Weight:
    """Return the expression as it is in evaluation, without dropout."""
    return copy.deepcopy(expression).eval() if expression.training else expression


def _method(adapter: Adapter) -> str:
    structure = adapter.record.get("recipe", {}).get("structure", [adapter.name])
    return str(structure[0])


def _kind(layer: StructuredLayer) -> tuple[str, tuple[int, ...]]:
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
    if any(_kind(adaptation.layers[p])[0] != "linear" for p in expressions):
        return None
    layers = {
        p: {leaf: e.leaf(leaf).tensor().detach() for leaf in ("b", "d")} for p, e in expressions.items()
    }
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
        written.kinds[path], written.windows[path] = _kind(layer)
        report.rows.append(row)
    transposed = {isinstance(adaptation.layers[p], StructuredTransposedLinear) for p in expressions}
    if len(transposed) > 1:
        raise Incompatible(
            "peft cannot hold LoRA of nn.Linear and of transformers' Conv1D in one adapter; export dense"
        )
    written.options["fan_in_fan_out"] = transposed == {True}
    return written


def _lora_leaves(
    path: str, expression: Weight, layer: StructuredLayer, rank: int | None, max_error: float | None
) -> tuple[dict[str, Tensor], float, dict[str, Any]]:
    """Return the leaves of one layer on disk, its alpha, and the report's row."""
    normalised = direction_of(expression)
    if normalised is not None and rank is None and max_error is None and not layer.looked_up:
        direction, magnitude = normalised
        pair = exact_change(direction)
        if pair is not None:
            leaves = {"up": pair[0], "down": pair[1], "magnitude": magnitude}
            return leaves, float(pair[0].shape[1]), _row(path, pair[0].shape[1])
    single = _single_pair(expression) if rank is None and max_error is None else None
    if single is not None:
        up, down = single.up.tensor().detach(), single.down.tensor().detach()  # type: ignore[attr-defined]
        return {"up": up, "down": down}, single.scale * down.shape[0], _row(path, down.shape[0])
    pair, row = change_of(path, expression, layer, rank, max_error)
    return {"up": pair[0], "down": pair[1]}, float(pair[0].shape[1]), row


def _single_pair(expression: Weight) -> Pair | None:
    """Return the pair of an expression that is W0 plus one plain trained product, so that its alpha can be kept."""
    pairs = list(expression.pairs())
    exact = exact_change(expression)
    if len(pairs) != 1 or exact is None or pairs[0].gate is not None:
        return None
    return pairs[0] if pairs[0].up.shape[1:] == exact[0].shape[1:] and len(pairs[0].up.shape) == 2 else None


@torch.no_grad()
def change_of(
    path: str, expression: Weight, layer: StructuredLayer, rank: int | None, max_error: float | None
) -> tuple[Factors, dict[str, Any]]:
    """Return up and down of a weight's change, scale folded in, and the report's row.

    Raises:
        InvalidOption: the change is not of low rank and neither `rank` nor `max_error` is given.
    """
    exact = exact_change(_still(expression))
    if exact is not None:
        return _cut(path, exact, rank, max_error)
    if rank is None and max_error is None:
        raise InvalidOption(
            f"{path}: this change is not of low rank; pass rank= or max_error= for its best approximation"
        )
    pair, error = approximated(dense_change(expression, layer.matrix()), rank, max_error)
    return pair, _row(path, pair[0].shape[1], error, exact=error == 0)


def _cut(
    path: str, pair: Factors, rank: int | None, max_error: float | None
) -> tuple[Factors, dict[str, Any]]:
    full = pair[0].shape[1]
    if (rank is None or rank >= full) and max_error is None:
        return pair, _row(path, full)
    _, values = truncated(pair, full)
    chosen = min(full, rank) if rank is not None else smallest_rank(values, max_error)
    error = tail_error(values, chosen)
    return truncated(pair, chosen)[0], _row(path, chosen, error, exact=False)


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
        if _kind(adaptation.layers[path])[0] != "linear":
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
