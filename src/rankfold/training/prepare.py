"""From settings to what a run needs before it adapts anything: task, base, examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rankfold.errors import Incompatible, InvalidOption
from rankfold.training.base import Base, length_limit, load_base, own_labels, read_model_config, task_of
from rankfold.training.config import RunConfig
from rankfold.training.data import Table, read_table
from rankfold.training.examples import Example, class_names, classified, collator, continued, label_values

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCORED_TRAINING_EXAMPLES = 256


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Args:
        config: the settings with the task, the class names and the length filled in.
        base: model and tokenizer.
        training: the training examples.
        scored: the examples of the metric.
        collate: makes a batch of examples.
    """

    config: RunConfig
    base: Base
    training: Sequence[Example]
    scored: Sequence[Example]
    collate: Callable[[list[Example]], dict[str, Any]]

    @property
    def scored_on(self) -> str:
        """What the metric is measured on, in words."""
        if self.config.eval_data:
            return self.config.eval_data
        return f"{len(self.scored)} training examples (no --eval-data)"


def prepare(config: RunConfig) -> Prepared:
    """Read the data, choose the task, load the base with a head for it, and make examples.

    Raises:
        RankfoldError: when the data, the model or the settings do not allow it.
    """
    from transformers import set_seed

    header = not any(name is not None and name.isdigit() for name in (config.text, config.label))
    table = read_table(config.data, header=header)
    other = read_table(config.eval_data, header=header) if config.eval_data else None
    architecture = read_model_config(config.model)
    config = replace(config, task=config.task or _task(config, architecture, table))
    if config.task == "classify":
        config = replace(config, labels=config.labels or _labels(config, architecture, table))
    set_seed(config.seed)  # a new head starts at random
    base = load_base(config.model, str(config.task), labels=config.labels, dtype=config.dtype)
    config = replace(config, max_length=length_limit(base, config.max_length))
    training = _examples(table, config, base)
    scored = training[:SCORED_TRAINING_EXAMPLES] if other is None else _examples(other, config, base)
    return Prepared(config, base, training, scored, collator(str(config.task), base.tokenizer))


def _task(config: RunConfig, architecture: "PretrainedConfig", table: Table) -> str:
    """Choose the task: a named label, else the model's architecture, else the columns."""
    named = "classify" if config.label else task_of(architecture)
    if named:
        return named
    columns = set(table.columns)
    if {config.text or "text", "label"} <= columns:
        return "classify"
    if table.prose or columns & {"messages", "completion"}:
        return "causal"
    raise Incompatible(
        f"neither the model {config.model} nor the columns of {table.name} ({', '.join(table.columns)}) "
        f"tell the task; choose it with --task causal or --task classify"
    )


def _labels(config: RunConfig, architecture: "PretrainedConfig", table: Table) -> tuple[str, ...]:
    table.require(config.label or "label", "label")
    values = label_values(table, config.label or "label")
    names = own_labels(architecture, values) or class_names(values)
    if len(names) < 2:
        raise InvalidOption(f"{table.name} has one class only, {names[0]!r}; a classifier needs two")
    return names


def _examples(table: Table, config: RunConfig, base: Base) -> list[Example]:
    assert config.max_length is not None  # filled in by prepare
    if config.labels is None:
        return continued(table, base.tokenizer, config.text, config.max_length)
    text, label = config.text or "text", config.label or "label"
    table.require(text, "text")
    table.require(label, "label")
    return classified(
        table, base.tokenizer, names=config.labels, text=text, label=label, max_length=config.max_length
    )
