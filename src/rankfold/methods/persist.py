"""Saving and loading adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import (
    BaseMismatch,
    FormatError,
    Incompatible,
    MissingDependency,
    MissingPath,
    RankfoldError,
)
from ..formats import Changes, native, native_peft, peft, read_changes
from ..formats.export import kind_and_window, refuse_tied
from ..formats.files import read_json
from ..formats.readers import home
from ..layers import StructuredLayer, require
from ..weights import adopt_ranks, adopt_selections, owned
from .biases import biases_of, given_biases
from .capacity import Allotment
from .checkpoints import describe
from .prepare import EVERYTHING, Prepared, install, prepare
from .recipe import Recipe, resolve

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# All that is fetched from a hub repository, which may hold much more; the last is written by `rankfold
# adapt`.
_HUB_FILES = [
    native.RECORD, native.TENSORS, native.CHECKPOINT_TENSORS, peft.CONFIG, peft.TENSORS, "README.md",
    "config.yaml", "pytorch_lora_weights.safetensors",
]  # fmt: skip
_ANY_FILE_HOLDS = 2**16


def save(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    overwrite: bool = False,
    push_to_hub: bool | str = False,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter to a folder: `rankfold.json`, `rankfold.safetensors`, a model card; never the base.

    The folder appears complete or not at all, and equal adapters give equal bytes.

    Args:
        model: an adapted model.
        path: the folder.
        name: of the adapter; None takes the only or the active one.
        overwrite: replace a folder that is there.
        push_to_hub: also upload it: to the repository of this id, or, if true, of the folder's name.
        notes: facts for the model card, such as metric values.

    Returns:
        The folder.

    Raises:
        NotAdapted: the model holds no such adapter.
        OutputExists: the folder is there and not empty.
        MissingDependency: `push_to_hub` is asked for without huggingface_hub.
    """
    adaptation = require(model)
    adapter = adaptation.adapter(name)
    hub = _hub() if push_to_hub else None
    record = describe(adaptation, adapter.name)
    folder = native.write(
        path, record, native.tensors_of(adaptation, adapter.name), overwrite=overwrite, notes=notes
    )
    if hub is not None:
        _upload(hub, folder, push_to_hub if isinstance(push_to_hub, str) else folder.resolve().name)
    return folder


def _upload(hub: Any, folder: Path, repository: str) -> None:
    api = hub.HfApi()
    identity = api.create_repo(repository, exist_ok=True).repo_id
    api.upload_folder(repo_id=identity, folder_path=str(folder), commit_message="Upload a Rankfold adapter")


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingDependency(
            "hub ids need the library huggingface_hub: pip install 'rankfold[hub]'"
        ) from None
    return huggingface_hub


def load(
    model: nn.Module, path: str | Path, name: str | None = None, *, revision: str | None = None
) -> nn.Module:
    """Load an adapter into its base model, in place; other tools' files are recognised.

    A peft folder is loaded as the method that it is where there is one of the same form; any other one, and a
    file of LyCORIS, kohya's trainers, diffusers or llama.cpp, as the plain LoRA of the same change, whose
    ranks may differ from weight to weight (`read_changes`).
    Nothing is drawn again, no data are read, and no code in the folder is run.

    Args:
        model: the base model.
        path: a folder or a file, or the id of a hub repository.
        name: for the adapter in this model; None takes the saved one.
        revision: of a hub repository.

    Returns:
        The model; it is unchanged if an error is raised.

    Raises:
        MissingPath: there is no such folder.
        FormatError: the folder is truncated, changed, or of a newer format.
        BaseMismatch: the adapter was made for another base.
    """
    place = home(locate(path, revision))
    if (place / native.RECORD).is_file():
        return _load_native(model, place, name)
    if (place / peft.CONFIG).is_file():
        return _load_peft(model, place, name)
    return _load_changes(model, read_changes(place, model), name)


def locate(path: str | Path, revision: str | None = None) -> Path:
    """Return a local folder or file for a path or a hub id.

    Raises:
        MissingPath: it is neither, nor a repository that can be reached.
    """
    folder = Path(path)
    if folder.is_dir() or (folder.is_file() and folder.suffix):
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(path)):
        raise MissingPath(f"there is no folder {path}")
    try:
        return Path(_hub().snapshot_download(str(path), revision=revision, allow_patterns=_HUB_FILES))
    except RankfoldError:
        raise
    except Exception as error:  # the hub's own errors have no common base
        raise MissingPath(
            f"there is no folder {path}, and no such hub repository can be reached: {error}"
        ) from None


def _load_native(model: nn.Module, folder: Path, name: str | None) -> nn.Module:
    adapter = native.read(folder)
    record = adapter.record
    check_ranks(record, adapter.tensors)
    with given_biases(model, biases_of(record)):
        _put_back(model, folder, adapter, name or str(record.get("name", "default")))
    return model


def _put_back(model: nn.Module, folder: Path, adapter: native.NativeAdapter, name: str) -> None:
    record = adapter.record
    prepared = rebuild(model, record, name)
    native.check_base(record, native.anchors(model, prepared.adapter.paths, prepared.layers))
    if prepared.adapter.record["plan"] != record["plan"]:
        raise FormatError(
            f"{folder}: this version of Rankfold plans the shared indices differently; it cannot load them"
        )
    for path, expression in prepared.expressions.items():
        adopt_selections(expression, native.leaves_of(path, adapter.tensors))
    changed = resolve(Recipe.from_dict(record["recipe"]), {}).rule is not None or record.get("squeezed")
    if changed:  # ranks may be others than those that were built
        for path, expression in prepared.expressions.items():
            adopt_ranks(expression, native.leaves_of(path, adapter.tensors))
    native.check_names(_expected(model, prepared), adapter.tensors)
    _put(model, prepared, adapter.tensors)


def check_ranks(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse ranks that no such file can have, before tensors of their size are made."""
    limit = max(_ANY_FILE_HOLDS, sum(tensor.numel() for tensor in tensors.values()))
    for path, rank in record["ranks"].items():
        if rank is not None and (type(rank) is not int or not 1 <= rank <= limit):
            raise FormatError(f"the adapter's record gives {path} the impossible rank {str(rank)[:20]}")


def rebuild(model: nn.Module, record: Mapping[str, Any], name: str) -> Prepared:
    """Build the shapes of a recorded adapter.

    Raises:
        RankfoldError: the model has no such places, or the record makes no sense, whatever it holds.
    """
    try:
        resolved = resolve(Recipe.from_dict(record["recipe"]), {})
        _check_paths(dict(model.named_modules(remove_duplicate=False)), record)
        return prepare(
            model,
            resolved,
            targets=re.compile("|".join(re.escape(path) for path in record["targets"])),
            name=name,
            seed=record["seed"],
            train=_trained(record),
            heads=False,
            blank=True,
            allotment=Allotment(record["ranks"], record.get("references", {}), record.get("rank")),
            removable=bool(record.get("removable", True)),
            stored_precision=bool(record.get("stored_precision", False)),
            rest_frozen=bool(record.get("rest_frozen", False)),
        )
    except RankfoldError:
        raise
    except Exception as error:  # whatever a changed record makes of types, sizes and shapes
        raise FormatError(f"the adapter's record is not consistent: {error!r}") from None


def _trained(record: Mapping[str, Any]) -> list[str] | str:
    paths = record["train"]
    return EVERYTHING if paths == [EVERYTHING] else [f"re:{re.escape(path)}" for path in paths]


def _check_paths(modules: Mapping[str, nn.Module], record: Mapping[str, Any]) -> None:
    if not record["targets"]:
        raise FormatError("the adapter's record names no targets")
    for path in [*record["targets"], *(p for p in record["train"] if p != EVERYTHING)]:
        parent = path.rpartition(".")[0]
        if path not in modules and not isinstance(
            getattr(modules.get(parent), "original", modules.get(parent)), nn.MultiheadAttention
        ):
            raise BaseMismatch(f"the adapter was made for a model that has {path}; this one has not")


def _expected(model: nn.Module, prepared: Prepared) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that a file of this adapter must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, expression in prepared.expressions.items():
        for leaf, (module, attribute) in owned(expression).items():
            shapes[f"{path}:{leaf}"] = tuple(getattr(module, attribute).shape)
    for path, branch in prepared.branches.items():
        for leaf, (module, attribute) in branch.owned().items():
            shapes[f"{path}:{leaf}"] = tuple(getattr(module, attribute).shape)
    shapes.update({f"shared:{key}": tuple(tensor.shape) for key, tensor in prepared.shared.items()})
    shapes.update({f"whole:{key}": tuple(tensor.shape) for key, tensor in prepared.whole.items()})
    return shapes


def _put(model: nn.Module, prepared: Prepared, tensors: Mapping[str, Tensor]) -> None:
    adaptation, name = install(model, prepared), prepared.adapter.name
    try:
        native.fill(adaptation, name, tensors)
    except BaseException:
        adaptation.remove(name)
        raise


# peft -------------------------------------------------------------------------------------------------


def _load_peft(model: nn.Module, folder: Path, name: str | None) -> nn.Module:
    settings = read_json(folder / peft.CONFIG)
    if native_peft.reads(settings):
        return _load_method_or_changes(model, folder, name)
    if settings.get("peft_type") not in ("LORA", "VERA"):
        return _load_changes(model, read_changes(folder, model), name)
    adapter = peft.read(folder)
    refuse_tied(model, adapter.whole.keys(), adapter.layers)
    prepared = rebuild(model, _peft_record(adapter), name or "default")
    for path in adapter.layers:
        _check_peft_layer(path, adapter, prepared.layers.get(path))
    tensors = _peft_tensors(adapter)
    expected = _expected(model, prepared)
    for key in adapter.shared:
        tensors[f"shared:{key}"] = _leading(adapter.shared[key], expected[f"shared:{key}"])
    native.check_names(expected, tensors)
    _put(model, prepared, tensors)
    return model


def _load_method_or_changes(model: nn.Module, folder: Path, name: str | None) -> nn.Module:
    """Load an adapter as the method that peft has it of, or, of convolutions, as the LoRA of its change."""
    try:
        return _load_other_peft(model, native_peft.read(folder), name)
    except (FormatError, BaseMismatch, Incompatible) as error:
        try:
            changes = read_changes(folder, model)
        except RankfoldError:
            raise error from None
    return _load_changes(model, changes, name)


def _load_changes(model: nn.Module, changes: Changes, name: str | None) -> nn.Module:
    """Load changes as a plain LoRA of scale 1, with a rank of its own for every weight."""
    refuse_tied(model, changes.whole.keys(), changes.paths)
    record = {
        "recipe": {"structure": ["lora", {"alpha": None}], "dynamics": []},
        "seed": 0,
        "targets": list(changes.paths),
        "ranks": {path: changes.rank(path) for path in changes.paths},
        "train": sorted({key.rpartition(".")[0] for key in changes.whole}),
    }
    prepared = rebuild(model, record, name or "default")
    tensors = {f"whole:{key}": value for key, value in changes.whole.items()}
    for path, (up, down) in changes.pairs.items():
        tensors |= {f"{path}:up": up, f"{path}:down": down}
    native.check_names(_expected(model, prepared), tensors)
    _put(model, prepared, tensors)
    return model


def _load_other_peft(model: nn.Module, adapter: native_peft.Native, name: str | None) -> nn.Module:
    """Load an adapter that peft keeps in a form of its own."""
    refuse_tied(model, adapter.whole.keys(), adapter.layers)
    structure = [native_peft.METHODS[adapter.kind].structure, native_peft.options_of(adapter)]
    record = {
        "recipe": {"structure": structure, "dynamics": []},
        "seed": 0,
        "targets": list(adapter.layers),
        "ranks": adapter.ranks,
        "train": sorted({key.rpartition(".")[0] for key in adapter.whole}),
    }
    prepared = rebuild(model, record, name or "default")
    for path in adapter.layers:
        if path not in prepared.layers or not native_peft.is_plain(prepared.layers[path]):
            raise BaseMismatch(f"{path} is adapted as linear in the file, and is no such layer here")
    tensors = {f"whole:{key}": value for key, value in adapter.whole.items()}
    for path, leaves in adapter.layers.items():
        tensors.update({f"{path}:{leaf}": value for leaf, value in leaves.items()})
    native.check_names(_expected(model, prepared), tensors)
    _put(model, prepared, tensors)
    return model


def _check_peft_layer(path: str, adapter: peft.PeftAdapter, layer: StructuredLayer | None) -> None:
    """Refuse a layer that is not of the kind and shape that a peft file was made for.

    Raises:
        BaseMismatch: the model has another kind of layer there, or other shapes or numbers.
        Incompatible: peft's change of such a layer is another map.
    """
    leaves, kind = adapter.layers[path], adapter.kinds[path]
    if layer is None or (kind, adapter.windows.get(path, ())) != kind_and_window(layer):
        raise BaseMismatch(f"{path} is adapted as {kind} in the file, and is no such layer here")
    if layer.op.groups > 1:
        raise Incompatible(f"{path}: peft's LoRA of a grouped convolution is another map")
    if "up" in leaves:
        native.check_shape(path, layer, (leaves["up"].shape[0], leaves["down"].shape[1]))
    base = adapter.bases.get(path)
    if base is not None and not _same_numbers(base, layer.stored()):
        raise BaseMismatch(
            f"the file holds a copy of {path} with other numbers than here: it was resized or trained"
        )


def _same_numbers(copy: Tensor, stored: Tensor) -> bool:
    """Say whether two copies of a weight are the same up to half precision."""
    if copy.shape != stored.shape:
        return False
    here, there = stored.detach().float(), copy.to(stored.device).float()
    return bool(torch.linalg.vector_norm(here - there) <= 0.01 * torch.linalg.vector_norm(here))


def _peft_tensors(adapter: peft.PeftAdapter) -> dict[str, Tensor]:
    """Return the tensors of layers and whole modules by saved name; scales that differ are folded in."""
    tensors = {f"whole:{key}": value for key, value in adapter.whole.items()}
    fold_in = adapter.kind == "LORA" and _common_alpha(adapter) is None
    for path, leaves in adapter.layers.items():
        tensors.update({f"{path}:{leaf}": value for leaf, value in leaves.items()})
        if fold_in:
            tensors[f"{path}:up"] = leaves["up"].float() * (adapter.alphas[path] / adapter.rank(path))
    return tensors


def _leading(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cut a shared tensor that was made for a larger model to the part that is read here."""
    return tensor[tuple(slice(n) for n in shape)]


def _common_alpha(adapter: peft.PeftAdapter) -> float | None:
    """Return the one alpha that serves all layers, or None: every scale is then folded into its up factor."""
    ranks = {adapter.rank(path) for path in adapter.layers}
    alphas = set(adapter.alphas.values())
    return min(alphas) if len(ranks) == len(alphas) == 1 and min(alphas) > 0 else None


def _peft_record(adapter: peft.PeftAdapter) -> dict[str, Any]:
    """Return the record of an adapter that was read from a peft folder."""
    if adapter.kind == "VERA":
        structure: tuple[str, dict[str, Any]] = ("vera", {})
    else:
        dora = any("magnitude" in leaves for leaves in adapter.layers.values())
        structure = ("dora" if dora else "lora", {"alpha": _common_alpha(adapter)})
    return {
        "recipe": {"structure": list(structure), "dynamics": []},
        "seed": 0,
        "targets": list(adapter.layers),
        "ranks": {path: adapter.rank(path) for path in adapter.layers},
        "train": sorted({key.rpartition(".")[0] for key in adapter.whole}),
    }
