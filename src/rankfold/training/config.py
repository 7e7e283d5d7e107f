"""What one training run is asked to do, and the file that repeats it."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from rankfold.errors import FormatError, InvalidOption, MissingPath, near_names

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CHOICES = {
    "task": ("causal", "classify"),
    "dtype": ("float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
}
DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run; each is also a flag of `rankfold adapt` and a key of its config file.

    Args:
        model: folder or hub name of a pretrained model.
        data: training data: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, a folder of .txt files, or a
            dataset of the hub, `name`, `name:split` or `name:subset:split`.
        out: folder that receives the adapter; only a plan needs none.
        method: the point, such as `lora`, `dora/pissa` or `abba/ranks=eva`.
        rank: rank of the change, or None for the method's default.
        targets: which modules: a preset, globs, regexes or paths; none takes the method's default.
        train: further modules that are trained whole.
        set: options of the method by axis, such as `{"structure.alpha": 32}`.
        task: `causal` or `classify`, or None to read it from the model and the data.
        text: column that holds the text; a number counts the columns of a table without a header from 0.
        label: column that holds the label, or its number likewise.
        labels: class names in the order of their ids, or None to read them from the model or the data.
        eval_data: data of the metric, as `data`; without it the metric is measured on training examples.
        lr: peak learning rate.
        epochs: passes over the data (3 when neither it nor `steps` is given).
        steps: optimizer steps, instead of `epochs`.
        batch_size: examples per forward pass and device.
        accumulate: forward passes per optimizer step.
        max_length: tokens per example, or None for 512 or what the model can hold, whichever is less.
        save_steps: optimizer steps between checkpoints, or None for a tenth of the run.
        seed: decides the adapter's start, a new head's start and the order of the data.
        dtype: `float32`, `bfloat16` or `float16`: the base's numbers; what is trained stays in float32.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InvalidOption: when a value cannot be meant.
    """

    model: str
    data: str
    out: str | None = None
    method: str = "lora"
    rank: int | None = None
    targets: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    text: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    eval_data: str | None = None
    lr: float = 2e-4
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    max_length: int | None = None
    save_steps: int | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        require_choices(self, CHOICES)
        require_positive(self, "lr", "epochs")
        require_counts(self, "steps", "batch_size", "accumulate", "save_steps")
        require(self, "max_length", lambda value: value >= 2, "at least 2, a token and the one it predicts")
        require(self, "seed", lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1")
        require_one_length(self)


def require(config: Any, name: str, allowed: Callable[[Any], bool], wanted: str) -> None:
    """Raise an `InvalidOption` where the setting `name` is given and not allowed."""
    value = getattr(config, name)
    if value is not None and not allowed(value):
        raise InvalidOption(f"{flag(name)} is {value}; it must be {wanted}")


def require_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Raise where a setting is none of its choices."""
    for name, known in choices.items():
        value = getattr(config, name)
        if value is not None and value not in known:
            raise InvalidOption(f"{name} is {value!r}; choose {', '.join(known)}")


def require_positive(config: Any, *names: str) -> None:
    """Raise where a setting is no positive number."""
    for name in names:
        require(config, name, lambda value: math.isfinite(value) and value > 0, "a positive number")


def require_counts(config: Any, *names: str) -> None:
    """Raise where a setting is less than 1."""
    for name in names:
        require(config, name, lambda value: value >= 1, "at least 1")


def require_one_length(config: Any) -> None:
    """Raise where `epochs` and `steps` are both given."""
    if config.epochs is not None and config.steps is not None:
        raise InvalidOption("epochs and steps both say how long to train; give one of them")


def flag(name: str) -> str:
    """Return the field `name` as it is spelled in a config file and, after two dashes, on the command line.

    Example:
        >>> flag("batch_size")
        'batch-size'
    """
    return name.replace("_", "-")


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """Read `axis.option=value` assignments, each value as a JSON literal or else as a string.

    Args:
        assignments: texts such as `structure.alpha=32`.

    Raises:
        InvalidOption: when an assignment has no `=` or names no axis.

    Example:
        >>> parse_options(["structure.alpha=32", "init.method=fast", "structure.rank_stabilised=true"])
        {'structure.alpha': 32, 'init.method': 'fast', 'structure.rank_stabilised': True}
    """
    options = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or "." not in name:
            raise InvalidOption(f"--set {assignment}: write axis.option=value, such as structure.alpha=32")
        options[name.strip()] = _literal(text.strip())
    return options


def read_config(path: str | Path, kind: "type[DataclassInstance]" = RunConfig) -> dict[str, Any]:
    """Read a YAML or JSON file of run settings as keyword arguments.

    Args:
        path: the file.
        kind: the dataclass of the settings.

    Raises:
        MissingPath: when there is no such file.
        FormatError: when it cannot be read, or is not a table of keys and values.
        InvalidOption: when a key or a value is not one of `kind`.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise MissingPath(f"there is no config file {file}")
    try:
        # JSON is a part of YAML.
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{file} cannot be read as YAML or JSON: {_one_line(error)}") from error
    if not isinstance(content, Mapping):
        raise FormatError(f"{file} is not a table of keys and values")
    names = {str(key): _field(str(key), kind) for key in content}
    return {names[str(key)]: _coerced(names[str(key)], value, kind) for key, value in content.items()}


def config_text(config: "DataclassInstance") -> str:
    """Return the YAML text that `read_config` turns into the same settings; what is not set is left out."""
    import yaml

    settings = json_settings(config).items()
    given = {flag(name): value for name, value in settings if not (value is False or value in (None, {}, []))}
    text: str = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    return text


def json_settings(config: "DataclassInstance") -> dict[str, Any]:
    """Return the settings as a JSON-like dict: tuples are lists."""
    settings = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _field(key: str, kind: "type[DataclassInstance]") -> str:
    name = key.replace("-", "_")
    known = [item.name for item in dataclasses.fields(kind)]
    if name not in known:
        raise InvalidOption(f"{key} is not a setting{near_names(key, map(flag, known))}")
    return name


def _coerced(name: str, value: Any, of: "type[DataclassInstance]") -> Any:
    """Return `value` as the field's type: YAML reads 2e-4 as text, 1 as an integer, one name as no list."""
    wanted = get_type_hints(of)[name]
    kinds = [kind for kind in (int, float, str) if wanted in (kind, kind | None)]
    if value is None or (name == "set" and isinstance(value, Mapping)):
        return value
    if wanted is bool:
        if isinstance(value, bool):
            return value
        raise InvalidOption(f"{flag(name)} is {value!r}; it must be true or false")
    if wanted in (tuple[str, ...], tuple[str, ...] | None):
        return tuple(str(item) for item in value) if isinstance(value, list) else (str(value),)
    try:
        [kind] = kinds
        converted = kind(value)
        # A list as text, a truth value as a number, or 1.5 as an integer would change what was meant.
        if not isinstance(value, bool | list | dict) and (kind is not int or converted == float(value)):
            return converted
    except (TypeError, ValueError):
        pass
    needed = f"of type {kinds[0].__name__}" if kinds else "a table of axis.option: value"
    raise InvalidOption(f"{flag(name)} is {value!r}; it must be {needed}")


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
