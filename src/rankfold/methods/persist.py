"""Saving and loading adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import BaseMismatch, FormatError, MissingDependency, MissingPath, RankfoldError
from ..formats import native, peft
from ..layers import StructuredEmbedding, require
from ..weights import owned
from .checkpoints import describe
from .prepare import Prepared, install, prepare
from .recipe import Recipe, resolve

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def save(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    overwrite: bool = False,
    push_to_hub: bool | str = False,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter to a folder: `rankfold.json`, `rankfold.safetensors` and a model card, no copy of the base.

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
    """
    adaptation = require(model)
    adapter = adaptation.adapter(name)
    record = describe(adaptation, adapter.name)
    folder = native.write(
        path, record, native.tensors_of(adaptation, adapter.name), overwrite=overwrite, notes=notes
    )
    if push_to_hub:
        _upload(folder, push_to_hub if isinstance(push_to_hub, str) else folder.name)
    return folder


def _upload(folder: Path, repository: str) -> None:
    hub = _hub()
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
    """Load an adapter into its base model, in place; a peft folder (LoRA, DoRA, VeRA) is recognised.

    Nothing is decomposed or drawn again, no data are read, and no code in the folder is run.

    Args:
        model: the base model.
        path: a folder, or the id of a hub repository.
        name: for the adapter in this model; None takes the saved one.
        revision: of a hub repository.

    Returns:
        The model; it is unchanged if an error is raised.

    Raises:
        MissingPath: there is no such folder.
        FormatError: the folder is truncated, changed, or of a newer format.
        BaseMismatch: the adapter was made for another base.
    """
    folder = locate(path, revision)
    if (folder / native.RECORD).is_file():
        return _load_native(model, folder, name)
    if (folder / peft.CONFIG).is_file():
        return _load_peft(model, folder, name)
    raise MissingPath(f"{folder} holds neither {native.RECORD} nor {peft.CONFIG}")


def locate(path: str | Path, revision: str | None = None) -> Path:
    """Return a local folder for a path or a hub id.

    Raises:
        MissingPath: it is neither a folder nor a repository that can be reached.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(path)):
        raise MissingPath(f"there is no folder {path}")
    try:
        patterns = ["*.json", "*.safetensors", "README.md"]
        return Path(_hub().snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except RankfoldError:
        raise
    except Exception as error:  # the hub's own errors have no common base
        raise MissingPath(
            f"there is no folder {path}, and no such hub repository can be reached: {error}"
        ) from None


def _load_native(model: nn.Module, folder: Path, name: str | None) -> nn.Module:
    adapter = native.read(folder)
    record = adapter.record
    prepared = _rebuild(model, record, name or str(record.get("name", "default")))
    native.check_base(model, record, prepared.layers)
    if prepared.adapter.record["plan"] != record["plan"]:
        raise FormatError(
            f"{folder}: this version of Rankfold plans the shared indices differently; it cannot load them"
        )
    native.check_names(_expected(model, prepared), adapter.tensors)
    _put(model, prepared, adapter.tensors)
    return model


def _rebuild(model: nn.Module, record: Mapping[str, Any], name: str) -> Prepared:
    """Build the shapes of a recorded adapter."""
    try:
        resolved = resolve(Recipe.from_dict(record["recipe"]), {})
        modules = dict(model.named_modules(remove_duplicate=False))
        _check_paths(modules, record)
        exact = re.compile("|".join(re.escape(path) for path in record["targets"]))
        return prepare(
            model,
            resolved,
            targets=exact,
            name=name,
            seed=record["seed"],
            train=record["train"],
            heads=False,
            blank=True,
            ranks=record["ranks"],
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(f"the adapter's record is not consistent: {error!r}") from None


def _check_paths(modules: Mapping[str, nn.Module], record: Mapping[str, Any]) -> None:
    if not record["targets"]:
        raise FormatError("the adapter's record names no targets")
    for path in record["targets"]:
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
    for path in prepared.train:
        module = model.get_submodule(path)
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            shapes[f"whole:{path}.{key}"] = tuple(tensor.shape)
    return shapes


def _put(model: nn.Module, prepared: Prepared, tensors: Mapping[str, Tensor]) -> None:
    adaptation = install(model, prepared)
    native.fill(adaptation, prepared.adapter.name, tensors)


def _load_peft(model: nn.Module, folder: Path, name: str | None) -> nn.Module:
    adapter = peft.read(folder)
    record = _peft_record(adapter)
    prepared = _rebuild(model, record, name or "default")
    tensors = {f"whole:{key}": value for key, value in adapter.whole.items()}
    tensors.update({f"shared:{key}": value for key, value in adapter.shared.items()})
    for path, leaves in adapter.layers.items():
        scale = adapter.alphas.get(path, 1.0) / adapter.rank(path) if adapter.kind == "LORA" else 1.0
        layer = prepared.layers[path]
        if adapter.kinds[path] == "embedding" and not isinstance(layer, StructuredEmbedding):
            raise FormatError(f"{path} is adapted as an embedding in the file and is none here")
        for leaf, value in leaves.items():
            tensors[f"{path}:{leaf}"] = (
                value * scale if leaf == "up" and not _common_alpha(adapter) else value
            )
    expected = _expected(model, prepared)
    for key, tensor in list(tensors.items()):
        if key.startswith("shared:") and key in expected:
            tensors[key] = _leading(tensor, expected[key])
    native.check_names(expected, tensors)
    _put(model, prepared, tensors)
    return model


def _leading(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cut a shared tensor that was made for a larger model to the part that is read here."""
    return tensor[tuple(slice(n) for n in shape)]


def _common_alpha(adapter: peft.PeftAdapter) -> bool:
    """Whether one alpha serves all layers; otherwise every scale is folded into its up factor."""
    ranks = {adapter.rank(path) for path in adapter.layers}
    return len(ranks) == 1 and len(set(adapter.alphas.values())) == 1


def _peft_record(adapter: peft.PeftAdapter) -> dict[str, Any]:
    """Return the record of an adapter that was read from a peft folder."""
    ranks = {path: adapter.rank(path) for path in adapter.layers}
    if adapter.kind == "VERA":
        structure: tuple[str, dict[str, Any]] = ("vera", {})
    else:
        dora = any("magnitude" in leaves for leaves in adapter.layers.values())
        alpha = next(iter(adapter.alphas.values())) if _common_alpha(adapter) else None
        structure = ("dora" if dora else "lora", {"alpha": alpha})
    recipe = {"structure": list(structure), "dynamics": []}
    return {
        "recipe": recipe,
        "seed": 0,
        "targets": list(adapter.layers),
        "ranks": ranks,
        "train": _whole_modules(adapter),
    }


def _whole_modules(adapter: peft.PeftAdapter) -> list[str]:
    return sorted({key.rpartition(".")[0] for key in adapter.whole})
