"""What a run leaves: a model that loads again."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rankfold.errors import MissingPath
from rankfold.pretrain.sharded import full_state
from rankfold.training.finished import BASE, STRUCTURE, load_finished

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

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
    model, tokenizer = load_finished(folder)
    if tokenizer is None:
        raise MissingPath(f"the folder {folder} holds no tokenizer")
    return model, tokenizer
