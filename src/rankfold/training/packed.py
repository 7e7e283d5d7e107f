"""Documents packed into sequences of one length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankfold.training.data import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def separator_of(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the id of the token that stands between documents."""
    for id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if id is not None:
            return int(id)
    return None


@dataclass(frozen=True)
class Packed:
    """Documents one after the other, each ended by the separator, cut into sequences of one length.

    What is left at the end, less than a sequence, is dropped.

    Args:
        stream: token ids, int32.
        length: tokens per sequence.
    """

    stream: Tensor
    length: int

    def __len__(self) -> int:
        return len(self.stream) // self.length

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.stream[number * self.length : (number + 1) * self.length]

    def first(self, count: int) -> "Packed":
        """Return the first sequences, `count` of them at most."""
        return Packed(self.stream[: count * self.length], self.length)


def pack(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int, name: str) -> Packed:
    """Return documents as packed sequences.

    Args:
        documents: the text.
        tokenizer: of the text.
        length: tokens per sequence.
        name: of the text, for messages.

    Raises:
        DataError: when there is not one sequence.
    """
    separator = separator_of(tokenizer)
    ends = [] if separator is None else [separator]
    pieces: list[Tensor] = []
    for start in range(0, len(documents), 256):
        rows = tokenizer(list(documents[start : start + 256]), add_special_tokens=False, verbose=False)
        pieces += [torch.tensor([*row, *ends], dtype=torch.int32) for row in rows["input_ids"]]
    packed = Packed(torch.cat(pieces), length)
    if not len(packed):
        raise DataError(f"{name} holds {len(packed.stream):,} tokens, less than one sequence of {length:,}")
    return packed


def collate(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return a batch of sequences, every token of which is predicted from those before it."""
    ids = torch.stack(list(rows)).long()
    return {"input_ids": ids, "labels": ids}
