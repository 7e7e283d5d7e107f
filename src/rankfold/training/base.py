"""The pretrained model and tokenizer that a run or an adapter starts from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.errors import FormatError, InvalidOption, MissingPath

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Base:
    """A pretrained model, its tokenizer, and what of it was not in the checkpoint.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer, with a padding token.
        fresh: paths of the modules that started at random, such as a new task head.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    fresh: tuple[str, ...]


def read_model_config(model: str) -> "PretrainedConfig":
    """Return the configuration of the model at `model`, a folder or a hub name.

    Raises:
        MissingPath: when there is no such model.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model)
    except Exception as error:  # a name, a file and the network fail in many ways
        place = (
            f"the folder {model} holds no model"
            if Path(model).is_dir()
            else (f"there is no model folder {model}, nor a hub model of that name that can be reached")
        )
        raise MissingPath(f"{place}: {_first_line(error)}") from error
    return config


def task_of(config: "PretrainedConfig") -> str | None:
    """Return the task that the model's architecture names, or None where it names neither."""
    tasks = [task_of_class(name) for name in getattr(config, "architectures", None) or []]
    return next((task for task in tasks if task), None)


def task_of_class(name: str) -> str | None:
    """Return the task of a model class, or None where its name tells neither.

    Example:
        >>> task_of_class("BertForSequenceClassification"), task_of_class("GPT2LMHeadModel")
        ('classify', 'causal')
    """
    if "SequenceClassification" in name:
        return "classify"
    return "causal" if "CausalLM" in name or "LMHeadModel" in name else None


def own_labels(config: "PretrainedConfig", values: Sequence[str]) -> tuple[str, ...] | None:
    """Return the model's own class names when it is a classifier whose names or ids cover `values`.

    Ids are answered by their text, so that integer labels keep meaning the model's classes.
    """
    if task_of(config) != "classify" or not config.id2label:
        return None
    names = tuple(str(name) for _, name in sorted(config.id2label.items()))
    for known in (names, tuple(str(number) for number in range(len(names)))):
        if set(values) <= set(known):
            return known
    return None


def load_base(model: str, task: str, *, labels: Sequence[str] | None = None, dtype: str = "float32") -> Base:
    """Load model and tokenizer.

    Args:
        model: a folder or a hub name.
        task: `causal` or `classify`.
        labels: class names in the order of their ids, for `classify`; None keeps the model's own.
        dtype: the name of a torch dtype.

    Raises:
        MissingPath: when there is no such model.
        FormatError: when its files cannot be read, or do not fit its configuration.
    """
    import transformers

    config = read_model_config(model)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    auto: Any = transformers.AutoModelForCausalLM
    if task == "classify":
        auto = transformers.AutoModelForSequenceClassification
        _name_classes(config, labels)
        # A head for other classes is replaced by a new one, which is then trained.
        options["ignore_mismatched_sizes"] = True
    try:
        with silence():
            loaded, info = auto.from_pretrained(model, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except Exception as error:  # every file format and model class fails in its own way
        raise FormatError(f"the model {model} cannot be loaded to {task}: {_first_line(error)}") from error
    ensure_padding(loaded, tokenizer)
    return Base(loaded, tokenizer, _fresh(info))


def load_as_saved(model: str, dtype: str = "auto") -> "tuple[PreTrainedModel, tuple[str, ...]]":
    """Load a model in the class that its configuration names, without a tokenizer.

    Args:
        model: a folder or a hub name.
        dtype: the name of a torch dtype, or "auto" for the checkpoint's.

    Returns:
        The model in evaluation mode, and the paths of modules that started at random.

    Raises:
        MissingPath: when there is no such model.
        FormatError: when its files cannot be read, or do not fit its configuration.
    """
    import transformers

    config = read_model_config(model)
    names = getattr(config, "architectures", None) or []
    kinds = [found for name in names if (found := getattr(transformers, name, None)) is not None]
    kind: Any = kinds[0] if kinds else transformers.AutoModel
    try:
        with silence():
            loaded, info = kind.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except Exception as error:  # every file format and model class fails in its own way
        raise FormatError(f"the model {model} cannot be loaded: {_first_line(error)}") from error
    return loaded.eval(), _fresh(info)


def load_tokenizer_of(model: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer beside a model.

    Raises:
        FormatError: when there is none that can be read.
    """
    import transformers

    try:
        with silence():
            tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(model)
    except Exception as error:  # every file format fails in its own way
        raise FormatError(f"the model {model} has no tokenizer to read: {_first_line(error)}") from error
    return tokenizer


def length_limit(base: Base, asked: int | None, name: str = "max-length") -> int:
    """Return how many tokens an example may have: `asked`, or 512, or what the model can hold.

    Args:
        base: model and tokenizer.
        asked: tokens, or None.
        name: of the setting, for messages.

    Raises:
        InvalidOption: when `asked` is more than the model can hold.
    """
    positions = getattr(base.model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    # A tokenizer without a limit of its own names an astronomic one.
    limit = min(int(positions), int(base.tokenizer.model_max_length))
    if asked is not None and asked > limit:
        raise InvalidOption(f"{name} is {asked}; the model holds at most {limit} tokens")
    return asked or min(DEFAULT_LENGTH, limit)


@contextmanager
def silence() -> Iterator[None]:
    """Keep transformers from remarks, such as what is new in a model, and from bars of its own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _name_classes(config: "PretrainedConfig", labels: Sequence[str] | None) -> None:
    if labels is None:
        return
    numbered = [str(number) for number in range(len(labels))]
    if list(labels) == numbered and config.num_labels == len(labels) and task_of(config) == "classify":
        return  # the labels are the ids of the model's own classes: it keeps their names
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in enumerate(labels)}


def ensure_padding(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let a tokenizer that has no padding token use another for it.

    Raises:
        FormatError: when it has no token that can fill up a batch.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise FormatError("the tokenizer has no token that can fill up a batch: give it a pad_token")
    # A classifier on a decoder finds the last token of a text by it.
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _fresh(info: dict[str, Any]) -> tuple[str, ...]:
    """Return the modules that hold the missing and the mismatched weights, in the order of their names."""
    keys = [*info["missing_keys"], *(item[0] for item in info["mismatched_keys"])]
    return tuple(sorted({key.rpartition(".")[0] for key in keys}))


def _first_line(error: BaseException) -> str:
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
