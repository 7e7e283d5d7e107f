"""From columns of a table to token ids and labels, and from those to padded batches."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rankfold.training.data import DataError, Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that no loss counts: transformers' own."""

Example = dict[str, Any]


def label_values(table: Table, column: str) -> list[str]:
    """Return the label column as class names: strings, whole numbers or a dataset's own class names.

    Raises:
        DataError: when a label is missing or a decimal number.
    """
    values = table.values(column)
    names = getattr(table.rows.features[column], "names", None)
    if names is not None:
        return [names[value] for value in values]
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str | int):
            raise DataError(
                f"{table.name}: row {number} has the {column} {value!r}, neither a name nor a whole number"
            )
    return [str(value) for value in values]


def class_names(values: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct labels in the order of their ids: by number where all are numbers, else by name.

    Example:
        >>> class_names(["10", "9", "10"]), class_names(["good", "bad"])
        (('9', '10'), ('bad', 'good'))
    """
    distinct = set(values)
    numeric = all(value.removeprefix("-").isdigit() for value in distinct)
    return tuple(sorted(distinct, key=int) if numeric else sorted(distinct))


def label_ids(values: Sequence[str], names: Sequence[str], source: str) -> list[int]:
    """Return the id of each label: its place in `names`.

    Raises:
        DataError: when a label is no class.

    Example:
        >>> label_ids(["good", "bad"], ("bad", "good"), "reviews.csv")
        [1, 0]
    """
    index = {name: number for number, name in enumerate(names)}
    unknown = next((value for value in values if value not in index), None)
    if unknown is not None:
        raise DataError(f"{source} has the label {unknown!r}; the classes are {', '.join(names)}")
    return [index[value] for value in values]


def classified(
    table: Table,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    names: Sequence[str],
    text: str,
    label: str,
    max_length: int,
) -> list[Example]:
    """Return one example per row: the tokens of column `text`, cut at `max_length`, and the class's id."""
    tokens = tokenizer(table.texts(text), truncation=True, max_length=max_length)["input_ids"]
    ids = label_ids(label_values(table, label), names, table.name)
    return [{"input_ids": row, "labels": id} for row, id in zip(tokens, ids, strict=True)]


def continued(
    table: Table, tokenizer: "PreTrainedTokenizerBase", text: str | None, max_length: int
) -> list[Example]:
    """Return examples for next-token prediction, by the columns that `table` has.

    - `text` (or the column named): the whole text and an end mark; a text file or folder is joined and cut
      into pieces of `max_length`.
    - `prompt` and `completion`: the loss counts the completion and the end mark only.
    - `messages`: the tokenizer's chat template; the loss counts what the template marks as the assistant's,
      or the whole conversation where it marks nothing.

    Raises:
        DataError: when none of these columns is there, or no example has a token to predict.
    """
    examples = _layout(table, text)(tokenizer, max_length)
    kept = [example for example in examples if any(label != IGNORED for label in example["labels"])]
    if not kept:
        raise DataError(f"{table.name} leaves no token to predict in {max_length} tokens per example")
    return kept


def collator(task: str, tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[Example]], dict[str, Any]]:
    """Return what pads examples to the longest of a batch: `input_ids`, `attention_mask`, `labels`."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if task == "classify":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


Maker = Callable[["PreTrainedTokenizerBase", int], list[Example]]


def _layout(table: Table, text: str | None) -> Maker:
    """Choose by the columns how examples are made."""
    if text is None and "messages" in table.columns:
        return lambda tokenizer, length: _conversations(table, tokenizer, length)
    if text is None and {"prompt", "completion"} <= set(table.columns):
        return lambda tokenizer, length: _completions(table, tokenizer, length)
    column = text or "text"
    table.require(column, "text")
    if table.prose:
        return lambda tokenizer, length: _pieces(table.texts(column), tokenizer, length)
    return lambda tokenizer, length: _texts(table.texts(column), tokenizer, length)


def _texts(texts: list[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Example]:
    rows = [_ended(row, tokenizer)[:max_length] for row in _tokens(texts, tokenizer)]
    return [_counted(row) for row in rows]


def _pieces(texts: list[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Example]:
    stream = [token for row in _tokens(texts, tokenizer) for token in _ended(row, tokenizer)]
    rows = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    return [_counted(row) for row in rows]


def _completions(table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Example]:
    # Apart, not joined: this is how the tokens arrive when the model later continues the prompt.
    prompts = _tokens(table.texts("prompt"), tokenizer)
    completions = _tokens(table.texts("completion"), tokenizer, special=False)
    return [
        _completion(prompt, _ended(completion, tokenizer), max_length)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _completion(prompt: list[int], completion: list[int], max_length: int) -> Example:
    """Join the two; where they are too long, the prompt loses its beginning, then the completion its end."""
    completion = completion[: max_length - 1]
    prompt = prompt[-(max_length - len(completion)) :]
    return _counted(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _conversations(table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Example]:
    if not tokenizer.chat_template:
        raise DataError(f"{table.name} holds messages, and the model's tokenizer has no chat template")
    marks = re.search(r"\{%-?\s*generation", str(tokenizer.chat_template)) is not None
    return [_conversation(messages, tokenizer, max_length, marks) for messages in table.values("messages")]


def _conversation(
    messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int, marks: bool
) -> Example:
    # A table fills keys that a message lacks with None.
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    encoded: Any = tokenizer.apply_chat_template(
        given, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks
    )
    row = encoded["input_ids"][:max_length]
    return _counted(row, encoded["assistant_masks"][:max_length] if marks else None)


def _counted(row: list[int], counts: Sequence[bool | int] | None = None) -> Example:
    """Label the tokens that count (all, by default) by themselves; nothing predicts the first."""
    kept = [True] * len(row) if counts is None else counts
    labels = [token if keep else IGNORED for token, keep in zip(row, kept, strict=True)]
    return {"input_ids": row, "labels": [IGNORED, *labels[1:]]}


def _tokens(texts: list[str], tokenizer: "PreTrainedTokenizerBase", special: bool = True) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return rows


def _ended(row: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    end = tokenizer.eos_token_id
    return row if end is None or row[-1:] == [end] else [*row, end]
