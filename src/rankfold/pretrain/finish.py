"""What a run leaves: a model that loads again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rankfold as rf
from rankfold.errors import MissingPath, RankfoldError
from rankfold.formats.files import read_tensors, write_json, write_tensors
from rankfold.layers import adaptation_of
from rankfold.pretrain.sharded import full_state
from rankfold.training.base import silence

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

BASE = "base"  # the folder of what an unfolded structure stands on
STRUCTURE = "structure"
RECORD = "config.json"  # of transformers; it is there when all is there
RESULTS = ("*.safetensors", "*.json", "*.jinja", "loss.png", BASE, STRUCTURE)


def whole_model(
    trainer: "Trainer", shards: bool, again: "Callable[[], PreTrainedModel]"
) -> "PreTrainedModel | None":
    """Return the trained model in one piece: itself, or where it is sharded a copy in the first process.

    Args:
        trainer: that trained it.
        shards: it is sharded.
        again: makes the model as it started.
    """
    if not shards:
        found: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
        return found
    state = full_state(trainer.model)  # type: ignore[arg-type]
    if not trainer.is_world_process_zero():
        return None
    model = again()
    model.load_state_dict(state)
    return model


def fold_where_possible(model: "PreTrainedModel") -> str | None:
    """Fold a trained model into a stock one, in place, and return why not where it cannot be folded."""
    if adaptation_of(model) is not None:
        try:
            rf.fold(model)
        except RankfoldError as error:
            return str(error)
    return None


def save_finished(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, facts: Mapping[str, Any]
) -> None:
    """Write a trained model, as a stock one where it is one and else in Rankfold's form.

    Args:
        model: what was trained, folded or not.
        tokenizer: its tokenizer.
        folder: to write into.
        facts: for the structure's card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.config.use_cache = True
    if adaptation_of(model) is None:
        model.save_pretrained(folder)
    else:
        _save_structured(model, folder, facts)


def _save_structured(model: "PreTrainedModel", folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the structure, and the tensors that it stands on, which are the seed's and not to be found."""
    rf.save(model, folder / STRUCTURE, notes=facts)
    names = set(_blank(model.config).state_dict())  # of these, a weight that was replaced is not there
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    (folder / BASE).mkdir()
    write_tensors(folder / BASE / "base.safetensors", kept)
    write_json(folder / RECORD, json.loads(model.config.to_json_string(use_diff=False)))


def _blank(config: "PretrainedConfig") -> "PreTrainedModel":
    """Return the model of a configuration without values."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def load_pretrained(folder: str | Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load what `rankfold pretrain` left, in whichever form, for use.

    Args:
        folder: of the run.

    Returns:
        The model and its tokenizer.

    Raises:
        MissingPath: the folder holds no finished run.

    Example:
        >>> model, tokenizer = load_pretrained("run")  # doctest: +SKIP
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(folder)
    if not (path / RECORD).is_file():
        raise MissingPath(f"the folder {folder} holds no finished model")
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    if not (path / STRUCTURE).is_dir():
        with silence():
            return AutoModelForCausalLM.from_pretrained(path), tokenizer
    found = AutoConfig.from_pretrained(path)
    with torch.random.fork_rng():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(found, dtype=found.dtype)
    model.load_state_dict(read_tensors(path / BASE / "base.safetensors"), strict=False)
    rf.load(model, path / STRUCTURE)
    return model.eval(), tokenizer
