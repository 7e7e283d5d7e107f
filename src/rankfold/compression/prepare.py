"""From settings to what a compression needs before it starts: model, sequences, and how much is wanted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankfold.catalogue import Method
from rankfold.compression.config import CompressConfig
from rankfold.compression.job import GRAMS, targeted
from rankfold.compression.registry import compressor_named, needs_of
from rankfold.compression.shares import check_options, share_named
from rankfold.compression.task import Task
from rankfold.errors import Incompatible, InvalidOption
from rankfold.layers import Targets
from rankfold.layers.targets import find_targets
from rankfold.statistics.watched import watch
from rankfold.training.base import (
    Base,
    ensure_padding,
    length_limit,
    load_as_saved,
    load_tokenizer_of,
    own_labels,
    task_of,
)
from rankfold.training.data import DataError, Table, read_table
from rankfold.training.examples import Example, classified, collator, label_values
from rankfold.training.finished import is_structured, load_finished
from rankfold.training.loop import runs_on_cpu
from rankfold.training.packed import collate, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BLOCKS, DEFAULT_TEXTS = 256, 1024  # of packed sequences, and of texts, which are shorter
BYTES = 8  # of a number in the Gram matrix of a weight's inputs
Collate = Callable[[list[Example]], dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """What a compression starts from.

    Attributes:
        config: the settings.
        method: that was asked for.
        model: that is compressed, on its device.
        tokenizer: of the model, or None where no text is read.
        weights: shapes (out, in) of the targeted weights, by path.
        training: sequences to calibrate on.
        unseen: sequences that are measured on.
        collate: makes a batch of sequences.
        available: tokens in the data, those that are held out among them.
        wanted: tokens that the widest targeted weight wants; 0 where the method reads no Gram matrix.
        fresh: modules of the model that are in no checkpoint.
    """

    config: CompressConfig
    method: Method
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    weights: dict[str, tuple[int, int]]
    training: Sequence[Example]
    unseen: Sequence[Example]
    collate: Collate
    available: int
    wanted: int
    fresh: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens to calibrate on."""
        return _tokens(self.training)

    def batches(self) -> list[dict[str, Any]]:
        """Return the batches to calibrate on."""
        rows, size = list(self.training), self.config.batch_size
        return [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    @property
    def memory(self) -> float | None:
        """Bytes that the statistics of one pass may take; None where the method goes its own way."""
        if self.config.memory is not None:
            return self.config.memory * 2**30
        if self.method.traits["whole"]:
            return None
        # Twice the largest is about what one layer of a transformer takes: its widest weight and all others.
        return 2.0 * BYTES * max(columns for _, columns in self.weights.values()) ** 2

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed compression has to find again: how much text there is, and its digest."""
        rows = [row["input_ids"] for row in self.training]
        digest = hashlib.sha256(b"".join(torch.as_tensor(row).numpy().tobytes() for row in rows))
        return {
            "sequences": len(self.training),
            "tokens": self.tokens,
            "wanted_tokens": self.wanted,
            "available_tokens": self.available,
            "unseen_sequences": len(self.unseen),
            "unseen_tokens": _tokens(self.unseen),
            "sha256": digest.hexdigest(),
        }


def prepare(config: CompressConfig) -> Prepared:
    """Load the model, read the text and part it.

    Raises:
        RankfoldError: when the settings, the text or the model do not allow it.
    """
    method = compressor_named(config.method)
    options = method.checked(config.options("compress"))
    device = torch.device("cpu" if runs_on_cpu(config.device) else "cuda")
    tables = [_table(source, config) for source in (config.data, config.eval_data)]
    if tables[0] is None and (needs_of(method, options) or needs_of(method, options, lookups=True)):
        raise InvalidOption(f"{method.name} calibrates on text: name it with --data")
    if config.share is not None or config.options("share"):
        check_options(share_named(config.share or method.traits["share"]), config.options("share"))
    model, tokenizer, fresh = load_model(config.model, config.dtype, texts=any(tables))
    found = _sequences(config, tables, model, tokenizer)
    targets = config.targets or method.traits["targets"]
    if not method.traits["whole"]:
        targeted(Task(model, 1.0, targets), method)  # refuses before a folder is touched
    weights = _shapes(model, targets)
    names = {need if isinstance(need, str) else need[0] for need in needs_of(method, options)}
    wanted = max((columns for _, columns in weights.values()), default=0) if names & GRAMS else 0
    _refuse_short(config, weights, _tokens(found[0]), wanted)
    model.to(device)  # type: ignore[arg-type]
    return Prepared(config, method, model, tokenizer, weights, *found, wanted, fresh)


def _shapes(model: PreTrainedModel, targets: Targets) -> dict[str, tuple[int, int]]:
    """Return the shapes of the targeted weights by path; of blocks, a row of all that they hold."""
    if targets == "blocks":
        found = find_targets(model, targets)
        return {t.path: (1, sum(p.numel() for p in t.module.parameters())) for t in found}
    return {weight.path: weight.layer.shape for weight in watch(model, targets)}


def _refuse_short(
    config: CompressConfig, weights: dict[str, tuple[int, int]], tokens: int, wanted: int
) -> None:
    """Refuse a text that is too short for the widest weight, before anything is written."""
    if tokens < wanted and config.few_tokens == "error":
        path = next(path for path, (_, columns) in weights.items() if columns == wanted)
        raise InvalidOption(
            f"{path}: the calibration data have {tokens} tokens, and its {wanted} inputs want at least as "
            "many; give more text, or --few-tokens allow"
        )


def load_model(
    name: str, dtype: str, *, texts: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, tuple[str, ...]]:
    """Load a model in the class that it was saved as.

    Args:
        name: a folder, in Rankfold's form or transformers', or a hub name.
        dtype: "auto" or the name of a torch dtype.
        texts: a tokenizer is needed, not only kept.

    Returns:
        Model, tokenizer or None, and the modules that started at random.
    """
    if is_structured(name):
        model, tokenizer = load_finished(name)
        return model if dtype == "auto" else model.to(getattr(torch, dtype)), tokenizer, ()
    model, fresh = load_as_saved(name, dtype)
    if texts or (Path(name) / "tokenizer_config.json").is_file():
        return model, load_tokenizer_of(name), fresh
    return model, None, fresh


def _table(source: str | None, config: CompressConfig) -> Table | None:
    header = not any(name is not None and name.isdigit() for name in (config.text, config.label))
    return None if source is None else read_table(source, header=header)


def _sequences(
    config: CompressConfig,
    tables: Sequence[Table | None],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[Sequence[Example], Sequence[Example], Collate, int]:
    """Return the sequences to calibrate on, the unseen ones, what makes batches, and the tokens in all."""
    data, other = tables
    if tokenizer is None or (data is None and other is None):
        return [], [], collated, 0
    if model.config.is_encoder_decoder:
        raise Incompatible(
            f"{config.model} is an encoder with a decoder, and text to calibrate on is not read for such "
            "models here; call rankfold.compress with batches"
        )
    read = _Reader(config, model, tokenizer)
    rows = [] if data is None else read(data)
    available = _tokens(rows)
    unseen = rows[len(rows) - _held_out(rows, config) :] if other is None else read(other)
    usual = DEFAULT_BLOCKS if read.causal else DEFAULT_TEXTS
    training = _limited(rows[: len(rows) - len(unseen)] if other is None else rows, config, usual)
    return training, unseen[: config.eval_samples], read.collate, available


def _held_out(rows: Sequence[Example], config: CompressConfig) -> int:
    """Return how many sequences are held out; of one sequence, none."""
    return min(math.ceil(config.held_out * len(rows)), config.eval_samples, len(rows) - 1) if rows else 0


def _limited(rows: Sequence[Example], config: CompressConfig, usual: int) -> Sequence[Example]:
    """Return as many sequences from the beginning as are asked for, or as usual."""
    if config.tokens is None:
        return rows[: config.samples or usual]
    count, total = 0, 0
    while count < len(rows) and total < config.tokens:
        total += len(rows[count]["input_ids"])
        count += 1
    return rows[:count]


class _Reader:
    """Makes sequences of a table: packed blocks for a model that predicts tokens, else texts one by one."""

    def __init__(
        self, config: CompressConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.length = length_limit(Base(model, tokenizer, ()), config.length, "length")
        self.causal = task_of(model.config) == "causal"
        self.collate: Collate = collated
        if not self.causal:
            ensure_padding(model, tokenizer)
            self.collate = collator("classify", tokenizer)

    def __call__(self, table: Table) -> list[Example]:
        text = self.config.text or "text"
        table.require(text, "text")
        label = self.config.label or "label"
        if task_of(self.model.config) == "classify" and label in table.columns:
            return self._labelled(table, text, label)
        if self.causal:
            packed = pack(table.texts(text), self.tokenizer, self.length, table.name)
            return [{"input_ids": row, "labels": row} for row in (packed[i] for i in range(len(packed)))]
        texts = table.texts(text)
        lines = [line for each in texts for line in each.splitlines()] if table.prose else texts
        filled = [line for line in lines if line.strip()]
        if not filled:
            raise DataError(f"{table.name} holds no text")
        rows = self.tokenizer(filled, truncation=True, max_length=self.length)
        return [{"input_ids": row} for row in rows["input_ids"]]

    def _labelled(self, table: Table, text: str, label: str) -> list[Example]:
        names = own_labels(self.model.config, label_values(table, label))
        if names is None:
            known = ", ".join(map(str, (self.model.config.id2label or {}).values()))
            raise DataError(f"{table.name} has labels in {label} that the model does not: it has {known}")
        return classified(table, self.tokenizer, names=names, text=text, label=label, max_length=self.length)


def collated(rows: list[Example]) -> dict[str, Any]:
    """Return a batch of packed sequences."""
    return collate([row["input_ids"] for row in rows])


def _tokens(rows: Sequence[Example]) -> int:
    return sum(len(row["input_ids"]) for row in rows)
