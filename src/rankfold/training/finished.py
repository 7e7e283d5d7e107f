"""Finished models in folders: stock ones, and those whose weights are expressions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rankfold as rf
from rankfold.errors import FormatError, MissingPath, RankfoldError
from rankfold.formats.files import read_tensors, write_json, write_tensors
from rankfold.layers import adaptation_of
from rankfold.training.base import silence

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BASE = "base"  # the folder of what an unfolded structure stands on
STRUCTURE = "structure"
RECORD = "config.json"  # of transformers; it is there when all is there


def fold_where_possible(model: "PreTrainedModel") -> str | None:
    """Fold a model into a stock one, in place, and return why not where it cannot be folded."""
    if adaptation_of(model) is not None:
        try:
            rf.fold(model)
        except RankfoldError as error:
            return str(error)
    return None


def save_finished(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    folder: Path,
    facts: Mapping[str, Any],
) -> None:
    """Write a model, as a stock one where it is one and else in Rankfold's form.

    Args:
        model: folded or not.
        tokenizer: its tokenizer, where it has one.
        folder: to write into.
        facts: for the structure's card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True
    if adaptation_of(model) is None:
        model.save_pretrained(folder)
    else:
        _save_structured(model, folder, facts)


def _save_structured(model: "PreTrainedModel", folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the structure, and the tensors that it stands on, which are not to be found elsewhere."""
    rf.save(model, folder / STRUCTURE, notes=facts)
    kept = _below(model)
    if kept:
        (folder / BASE).mkdir()
        write_tensors(folder / BASE / "base.safetensors", kept)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    settings = json.loads(model.config.to_json_string(use_diff=False))
    dtype = str(model.dtype).removeprefix("torch.")
    write_json(folder / RECORD, {**settings, "architectures": [type(model).__name__], "dtype": dtype})


def _below(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """Return the model's own tensors, but those that the adapter's file holds."""
    adaptation = adaptation_of(model)
    assert adaptation is not None
    layers = adaptation.layers.values()
    # Where weights are still there, the adapter's file is checked against them before it is loaded.
    names = adaptation.active if layers and all(layer.is_released for layer in layers) else ()
    held = {key for name in names for key in adaptation.adapters[name].values}
    tensors = model.state_dict()
    held_by_id = {tensors[key].data_ptr() for key in held if key in tensors}  # ties have several names
    stock = set(_blank(type(model), model.config).state_dict())  # a replaced weight is not among `tensors`
    found = {name: tensor for name, tensor in tensors.items() if name in stock - held}
    return {name: tensor for name, tensor in found.items() if tensor.data_ptr() not in held_by_id}


def _blank(kind: "type[PreTrainedModel]", config: "PretrainedConfig") -> "PreTrainedModel":
    """Return the model of a configuration without values."""
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config)
    return model


def class_of(config: "PretrainedConfig") -> "type[PreTrainedModel]":
    """Return the class of transformers that a configuration names.

    Raises:
        FormatError: it names none that transformers has.
    """
    import transformers

    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if found is not None:
            kind: type[PreTrainedModel] = found
            return kind
    raise FormatError(
        f"the model's configuration names the classes {config.architectures}, none of which transformers has"
    )


def is_structured(folder: str | Path) -> bool:
    """Say whether a folder holds a model in Rankfold's form."""
    return (Path(folder) / STRUCTURE).is_dir()


def load_finished(folder: str | Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    """Load what `rankfold pretrain` or `rankfold compress` left, in whichever form, for use.

    Args:
        folder: of the run.

    Returns:
        The model, in the class that it was saved as, and its tokenizer, or None where there is none.

    Raises:
        MissingPath: the folder holds no finished model.
        FormatError: its class is none of transformers'.

    Example:
        >>> model, tokenizer = load_finished("run")  # doctest: +SKIP
    """
    from transformers import AutoConfig, AutoTokenizer

    path = Path(folder)
    if not (path / RECORD).is_file():
        raise MissingPath(f"the folder {folder} holds no finished model")
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(path) if has_tokenizer else None
    found = AutoConfig.from_pretrained(path)
    kind = class_of(found)
    with silence():
        if not is_structured(path):
            return kind.from_pretrained(path), tokenizer
        return _load_structured(path, kind, found), tokenizer


def _load_structured(
    path: Path, kind: "type[PreTrainedModel]", config: "PretrainedConfig"
) -> "PreTrainedModel":
    with torch.random.fork_rng():
        model = kind._from_config(config, dtype=config.dtype)
    base = path / BASE / "base.safetensors"
    if base.is_file():
        model.load_state_dict(read_tensors(base), strict=False)
    rf.load(model, path / STRUCTURE)
    if (path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(path)
    loaded: PreTrainedModel = model.eval()
    return loaded
