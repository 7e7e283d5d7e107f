"""Writing an adapter in the forms that other tools read."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption, NotDense, OutputExists
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
from . import card, gguf, native, native_peft, peft, portable
from .approximate import Goal, Row, change_of, row_of
from .change import Pair as Factors
from .change import direction_of, exact_change
from .files import complete_file, complete_folder, make_parent, write_text
from .report import Report

FORMATS = ("peft", "portable", "dense", "gguf")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Task:
    """What a writer is given: an adapter that stands alone on its base, how it is wanted, and the report."""

    adaptation: Adaptation
    adapter: Adapter
    report: Report
    goal: Goal
    native: bool
    dtype: str
    drop_whole: bool


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "peft",
    *,
    name: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    grams: Mapping[str, Tensor] | None = None,
    native: bool = True,
    dtype: str = "f32",
    overwrite: bool = False,
    drop_whole: bool = False,
) -> Report:
    """Write an adapter in another tool's form, as `rankfold.export` does; it says what the arguments are.

    Args:
        model: an adapted model.
        path: the folder, or for "gguf" the file or folder.
        format: one of `FORMATS`.
        name: of the adapter.
        rank: of the approximation.
        max_error: largest relative error of a weight.
        grams: Gram matrices (in, in) of the inputs by path, which weigh the approximations.
        native: write other methods than LoRA as peft stores them.
        dtype: of the tensors in a GGUF file, "f32" or "f16".
        overwrite: replace what is there.
        drop_whole: leave out modules trained whole.

    Raises:
        Incompatible: the form cannot hold the adapter.
        InvalidOption: the arguments make no sense together, or a change is not of low rank.
        OutputExists: the folder is there.
    """
    check_options(format, rank, max_error, data=bool(grams), dtype=dtype)
    adaptation = require(model)
    adapter = adaptation.adapter(name)
    if format != "dense" and (adapter.scratch or adapter.record.get("train") == ["all"]):
        raise Incompatible(
            f"everything in the model was trained, and the {format} form holds changes of a known base; use "
            'format="dense"'
        )
    report = Report(format, str(path))
    goal = Goal(rank, max_error, dict(grams or {}))
    task = Task(adaptation, adapter, report, goal, native, dtype, drop_whole)
    _refuse_not_finite(adaptation, adapter)
    with alone(adaptation, adapter):
        if format == "gguf" and Path(path).suffix == ".gguf":
            with _complete_file(Path(path), overwrite=overwrite) as file:
                _write_gguf(task, file)
        else:
            with complete_folder(path, overwrite=overwrite) as folder:
                _WRITERS[format](task, folder)
    return report


def _refuse_not_finite(adaptation: Adaptation, adapter: Adapter) -> None:
    """Refuse an adapter whose training has failed.

    Raises:
        Incompatible: naming the tensor.
    """
    for key, value in native.tensors_of(adaptation, adapter.name).items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise Incompatible(f"{key} holds NaN or infinite entries, which are not written for others")


def check_options(
    format: str, rank: int | None, max_error: float | None, *, data: bool = False, dtype: str = "f32"
) -> None:
    """Refuse arguments that make no sense.

    Raises:
        InvalidOption: naming them.
    """
    if format not in FORMATS:
        raise InvalidOption(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if rank is not None and rank < 1:
        raise InvalidOption(f"rank must be at least 1, not {rank}")
    if max_error is not None and not 0 < max_error < 1:
        raise InvalidOption(f"max_error must lie between 0 and 1, not {max_error}")
    if format == "dense" and (rank is not None or max_error is not None or data):
        raise InvalidOption("the dense form is exact: leave rank=, max_error= and data= away")
    if rank is not None and max_error is not None:
        raise InvalidOption("rank= and max_error= both choose the rank; pass one of them")
    if data and rank is None and max_error is None:
        raise InvalidOption("data= weighs an approximation, and none is asked for: pass rank= or max_error=")
    if dtype not in gguf.DTYPES:
        raise InvalidOption(f"dtype must be one of {', '.join(gguf.DTYPES)}, not {dtype!r}")
    if dtype != "f32" and format != "gguf":
        raise InvalidOption(
            f"dtype= chooses the numbers of a GGUF file; the {format} form keeps the adapter's"
        )


@contextlib.contextmanager
def _complete_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary file that takes the place of `path` when the block ends without an error."""
    if path.is_dir():
        raise OutputExists(f"{path} is a folder, not a file")
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} exists; pass overwrite=True (--overwrite) to replace a file")
    make_parent(path)
    with complete_file(path) as file:
        yield file


@contextlib.contextmanager
def alone(adaptation: Adaptation, adapter: Adapter) -> Iterator[None]:
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


def _write_dense(task: Task, folder: Path) -> None:
    plain = fold(copy.deepcopy(task.adaptation.root))
    task.report.rows += [row_of(path, None) for path in task.adapter.paths]
    save = getattr(plain, "save_pretrained", None)
    if callable(save):
        save(folder)
    else:
        from safetensors.torch import save_model

        save_model(plain, str(folder / "model.safetensors"))


def _write_card(task: Task, folder: Path) -> None:
    report, root = task.report, task.adaptation.root
    notes = {"format": report.format, "largest relative error": f"{report.largest_error:.3g}"}
    if report.largest_output_error is not None:
        notes["largest relative error of outputs"] = f"{report.largest_output_error:.3g}"
    base = {"name": _base_name(root), "class": type(root).__name__}
    text = card.model_card({**task.adapter.record, "base": base}, notes, library="peft")
    write_text(folder / "README.md", text)


def _base_name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _options(adaptation: Adaptation) -> dict[str, Any]:
    root = adaptation.root
    task = next((task for suffix, task in _TASKS.items() if type(root).__name__.endswith(suffix)), None)
    revision = getattr(getattr(root, "config", None), "_commit_hash", None)
    return {"base_model_name_or_path": _base_name(root) or None, "task_type": task, "revision": revision}


# peft -------------------------------------------------------------------------------------------------


def _write_peft(task: Task, folder: Path) -> None:
    adaptation, adapter = task.adaptation, task.adapter
    expressions = _checked(adaptation, adapter, "peft")
    whole = {key: value.detach() for key, value in adaptation.whole(adapter.name).items()}
    refuse_tied(adaptation.root, whole.keys())
    options = _options(adaptation) | _unambiguous(adaptation.root, list(expressions))
    if whole:
        options["modules_to_save"] = sorted({str(m) for m in adapter.record.get("train", ())})
    found = _natively(task, expressions)
    if found is not None:
        found.whole, found.options = whole, options
        native_peft.write(folder, found)
        task.report.method = found.kind
        task.report.rows += [row_of(path, found.ranks[path]) for path in expressions]
    else:
        written = _as_vera(task, expressions) or _as_lora(task, expressions)
        written.whole = whole
        transposed = [isinstance(adaptation.layers[path], StructuredTransposedLinear) for path in expressions]
        written.options |= options | {"fan_in_fan_out": any(transposed)}
        task.report.method = written.kind
        peft.write(folder, written)
    _write_card(task, folder)


def _natively(task: Task, expressions: Mapping[str, Weight]) -> native_peft.Native | None:
    """Return the adapter in its own method of peft, or None where peft has none that is the same map."""
    if not task.native or not task.goal.exact:
        return None
    layers = {path: task.adaptation.layers[path] for path in expressions}
    if not all(native_peft.is_plain(layer) for layer in layers.values()):
        return None
    return native_peft.found(task.adapter.record, expressions, layers)


def refuse_tied(model: nn.Module, whole: Set[str], adapted: Iterable[str] = ()) -> None:
    """Refuse a tensor that another module shares, for other tools' files change one of the two alone.

    Args:
        model: the base.
        whole: names of tensors trained whole, which peft unties at loading.
        adapted: paths of layers with a change of low rank.

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
    for key in (f"{path}.weight" for path in adapted):
        others = [name for name in names[id(parameters[key])] if name != key] if key in parameters else []
        if others:
            raise Incompatible(
                f"{key} shares its tensor with {others[0]} here, and the file changes one of them alone; "
                "untie them first"
            )


def _unambiguous(model: nn.Module, paths: list[str]) -> dict[str, Any]:
    """Return targets as one pattern where peft would take a path for the end of another one, too."""
    names = {name for name, _ in model.named_modules() if name not in paths}
    if not any(name.endswith(f".{path}") for path in paths for name in names):
        return {}
    return {"target_modules": "|".join(re.escape(path) for path in sorted(paths))}


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


def _as_vera(task: Task, expressions: Mapping[str, Weight]) -> peft.PeftAdapter | None:
    adaptation, adapter = task.adaptation, task.adapter
    if not task.native or not task.goal.exact:
        return None
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
    written = peft.PeftAdapter("VERA", layers, dict.fromkeys(layers, "linear"), shared=shared)
    task.report.rows += [row_of(p, written.rank(p)) for p in expressions]
    return written


def _is_vera(expression: Weight) -> bool:
    names = {leaf.name for leaf in expression.leaves()}
    return (
        names == {"W0", "b", "up", "d", "down"}
        and sum(isinstance(x, Pooled) for x in expression.leaves()) == 2
    )


def _as_lora(task: Task, expressions: Mapping[str, Weight]) -> peft.PeftAdapter:
    written = peft.PeftAdapter("LORA", {}, {})
    for path, expression in expressions.items():
        layer = task.adaptation.layers[path]
        leaves, alpha, row = _lora_leaves(path, expression, layer, task)
        written.layers[path], written.alphas[path] = leaves, alpha
        written.kinds[path], written.windows[path] = kind_and_window(layer)
        task.report.rows.append(row)
    return written


def _lora_leaves(
    path: str, expression: Weight, layer: StructuredLayer, task: Task
) -> tuple[dict[str, Tensor], float, Row]:
    """Return the leaves of one layer on disk, its alpha, and the report's row."""
    normalised = direction_of(expression) if task.native and task.goal.exact else None
    if normalised is not None:
        direction, magnitude = normalised
        pair = exact_change(direction)
        if pair is not None:
            leaves = {"up": pair[0], "down": pair[1], "magnitude": magnitude}
            return leaves, float(pair[0].shape[1]), row_of(path, pair[0].shape[1])
    single = _single_pair(expression) if task.goal.exact else None
    if single is not None:
        up, down = single.up.dense().detach(), single.down.dense().detach()
        return {"up": up, "down": down}, single.scale * down.shape[0], row_of(path, down.shape[0])
    pair, row = change_of(path, expression, layer, task.goal)
    return {"up": pair[0], "down": pair[1]}, float(pair[0].shape[1]), row


def _single_pair(expression: Weight) -> Pair | None:
    """Return the pair of W0 plus one plain trained product, whose alpha can be kept; else None."""
    pairs, leaves = list(expression.pairs()), list(expression.leaves())
    if len(pairs) != 1 or pairs[0].gate is not None or len(pairs[0].up.shape) != 2 or len(leaves) != 3:
        return None
    if any(isinstance(leaf, Moved) for leaf in leaves):  # has taken in changes of its own
        return None
    return pairs[0] if isinstance(expression, Sum) else None


# plain LoRA of linear layers -----------------------------------------------------------------------------


def _plain_changes(task: Task, form: str) -> dict[str, Factors]:
    """Return up and down of every weight, for a form that holds nothing but LoRA of linear layers.

    Raises:
        Incompatible: something in the adapter is no such thing.
    """
    adaptation = task.adaptation
    expressions = _checked(adaptation, task.adapter, form)
    for path in expressions:
        if kind_and_window(adaptation.layers[path])[0] != "linear":
            raise Incompatible(
                f"{path}: servers read LoRA of linear layers only; leave it out of targets or export dense"
            )
    whole = sorted(adaptation.whole(task.adapter.name))
    if whole and not task.drop_whole:
        raise Incompatible(
            f"the {form} form cannot hold {whole[0]}, which was trained whole; pass drop_whole=True"
        )
    task.report.dropped += whole
    pairs = {}
    for path, expression in expressions.items():
        pairs[path], row = change_of(path, expression, adaptation.layers[path], task.goal)
        task.report.rows.append(row)
    return pairs


def _write_portable(task: Task, folder: Path) -> None:
    for path in task.adapter.paths:
        if isinstance(task.adaptation.layers.get(path), StructuredTransposedLinear):
            raise Incompatible(
                f"{path}: servers want fan_in_fan_out unset, which transformers' Conv1D layers need"
            )
    pairs = _plain_changes(task, "portable")
    portable.write(folder, pairs, _options(task.adaptation))
    _write_card(task, folder)


def _write_gguf(task: Task, file: Path) -> None:
    root = task.adaptation.root
    gguf.check(root, task.adapter.paths)
    pairs = _plain_changes(task, "gguf")
    gguf.write(file, root, pairs, dtype=task.dtype, base=_base_name(root))


def _write_gguf_folder(task: Task, folder: Path) -> None:
    _write_gguf(task, folder / gguf.FILE)


_WRITERS = {
    "peft": _write_peft, "portable": _write_portable, "gguf": _write_gguf_folder, "dense": _write_dense,
}  # fmt: skip
