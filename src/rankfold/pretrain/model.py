"""The model of a run: its configuration, its random start, its structure."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rankfold as rf
from rankfold.errors import FormatError, InvalidOption
from rankfold.methods.recipe import resolve, split_part
from rankfold.methods.registry import needs_of, structure_named
from rankfold.pretrain.config import PretrainConfig
from rankfold.pretrain.ladder import rung
from rankfold.training.base import read_model_config
from rankfold.training.packed import separator_of
from rankfold.training.run import recipe, refuse_inputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OPTIMIZER = "optimizer"  # the axis of `set` that belongs to no structure
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.float32}


def model_config(config: PretrainConfig) -> "PretrainedConfig":
    """Return the configuration of a size of the ladder, a file, a folder or a model of the hub.

    Raises:
        MissingPath: when there is none.
        InvalidOption: when a sequence is longer than the model's.
    """
    size = rung(config.model)
    path = Path(config.model)
    found = size.config() if size else read_model_config(str(path.parent if _is_config(path) else path))
    longest = getattr(found, "max_position_embeddings", None)
    if longest is not None and config.length > longest:
        raise InvalidOption(f"length is {config.length}; the model holds at most {longest} tokens")
    return found


def _is_config(path: Path) -> bool:
    return path.name == "config.json" and path.is_file()


def adopt_tokenizer(found: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give a configuration the tokenizer's vocabulary and separator."""
    found.vocab_size = len(tokenizer)
    found.bos_token_id = found.eos_token_id = separator_of(tokenizer)
    found.pad_token_id = tokenizer.pad_token_id
    if hasattr(found, "is_decoder"):
        found.is_decoder = True  # encoders that can also be decoders look ahead otherwise


def start(found: "PretrainedConfig", config: PretrainConfig, device: str | None = None) -> "PreTrainedModel":
    """Return a model that starts at random, as its class does, decided by the seed.

    Args:
        found: its configuration.
        config: the settings.
        device: "meta" makes one without values.

    Raises:
        FormatError: when transformers has no language model of that kind.
    """
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(config.seed)
    try:
        with torch.device(device) if device else nullcontext():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(found, dtype=DTYPES[config.dtype])
    except (ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FormatError(f"no language model can be made of {config.model}: {reason}") from error
    model.config.use_cache = False
    model.train()
    return model


def structure_point(config: PretrainConfig) -> rf.Recipe | None:
    """Return the recipe of the weights, or None where they are trained as they are.

    Raises:
        RankfoldError: when it cannot mean anything, or needs what a random model cannot give.
    """
    options = {key: value for key, value in config.set.items() if key.partition(".")[0] != OPTIMIZER}
    if config.structure is None:
        for key in options:
            raise InvalidOption(f"{key} needs a structure: name one with --structure")
        for name, given in (("rank", config.rank is not None), ("targets", bool(config.targets))):
            if given:
                raise InvalidOption(
                    f"{name} is the structure's: name one with --structure; an optimizer's rank is given by "
                    "--set optimizer.rank=..."
                )
        return None
    point = recipe(config.structure, options)
    refuse_inputs(point)
    return point


def structured(model: "PreTrainedModel", point: rf.Recipe, config: PretrainConfig, data: Any = None) -> None:
    """Give a model its structure; everything that has none is trained beside it.

    Args:
        model: starts at random.
        point: the recipe.
        config: the settings.
        data: the first batches, for starts and ranks that read them.
    """
    rf.adapt(model, point, **structure_arguments(model, point, config, data))


def structure_arguments(
    model: "PreTrainedModel", point: rf.Recipe, config: PretrainConfig, data: Any = None
) -> dict[str, Any]:
    """Return what `rf.adapt` and `rf.plan` are told beside model and method."""
    resolved = resolve(point, {})
    asked = (
        (resolved.structure, resolved.options),
        (resolved.init, resolved.init_options),
        (resolved.ranks, resolved.ranks_options),
    )
    reads_data = any(needs_of(method, options, 1) for method, options in asked)
    traits = structure_named(split_part(point.structure)[0]).traits
    arguments: dict[str, Any] = {
        "rank": usual_rank(model) if config.rank is None and traits["rank"] is not None else config.rank,
        "targets": list(config.targets) or (None if traits["activations"] else "all-linear"),
        "seed": config.seed,
        "train": "all",
        "removable": False,  # there is nothing to go back to
        "data": data if reads_data else None,
    }
    if resolved.init is not None and resolved.init.traits["rate"]:
        arguments["lr"] = config.lr
    return arguments


def usual_rank(model: "PreTrainedModel") -> int:
    """Return a quarter of the model's width, the ratio of the papers' runs from 60M to 7B."""
    width = getattr(model.config.get_text_config(), "hidden_size", None) or model.config.vocab_size
    return max(1, int(width) // 4)
