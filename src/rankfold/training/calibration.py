"""Text that only shows a model its inputs: batches of token ids, without labels."""

from typing import Any

from rankfold.training.base import Base, length_limit
from rankfold.training.data import read_table
from rankfold.training.examples import Example, collator, continued

BATCH, EXAMPLES = 8, 256  # no more than the papers on compression take


def calibration_batches(base: Base, data: str) -> list[dict[str, Any]]:
    """Return the first 256 examples of a text in batches of 8, as `rankfold adapt` reads it.

    Args:
        base: the model that will see them; its tokenizer makes them.
        data: a file, folder or dataset of the hub.

    Raises:
        RankfoldError: when the data cannot be read, or lack the column.
    """
    examples = [{"input_ids": example["input_ids"]} for example in _examples(base, data)[:EXAMPLES]]
    collate = collator("classify", base.tokenizer)  # pads, and asks for no labels
    return [collate(examples[start : start + BATCH]) for start in range(0, len(examples), BATCH)]


def _examples(base: Base, data: str) -> list[Example]:
    table, length = read_table(data), length_limit(base, None)
    if not type(base.model).__name__.endswith("ForSequenceClassification"):
        return continued(table, base.tokenizer, None, length)
    table.require("text", "text")
    tokens = base.tokenizer(table.texts("text"), truncation=True, max_length=length)["input_ids"]
    return [{"input_ids": row} for row in tokens]
