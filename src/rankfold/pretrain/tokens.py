"""Tokenizers, and documents packed into sequences of one length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankfold.errors import FormatError, InvalidOption, MissingPath
from rankfold.training.data import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"
SMALLEST = 257  # every byte, and the separator


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE, which has a token for every text.

    Args:
        documents: the text.
        vocabulary: tokens, the separator of documents among them.

    Raises:
        InvalidOption: when the vocabulary does not hold every byte.
        DataError: when the text does not support as many tokens.

    Example:
        >>> train_tokenizer(["the cat, the hat"] * 2, 259).tokenize("the hat")
        ['t', 'he', 'Ġ', 'h', 'at']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < SMALLEST:
        raise InvalidOption(f"a vocabulary of {vocabulary} does not hold every byte; it needs {SMALLEST}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    if bpe.get_vocab_size() < vocabulary:
        raise DataError(
            f"the text supports a vocabulary of {bpe.get_vocab_size():,} tokens and not of {vocabulary:,}: "
            f"give more text, or --vocab {bpe.get_vocab_size()}"
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SEPARATOR, pad_token=SEPARATOR)


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer.

    Args:
        name: a folder, a `tokenizer.json` or a hub name.

    Raises:
        MissingPath: when there is none.
        FormatError: when it has no token that ends a text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if Path(name).is_file():
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=name)
            if SEPARATOR in tokenizer.get_vocab():
                tokenizer.eos_token = SEPARATOR
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a name, a file and the network fail in many ways
        reason = str(error).strip().split("\n")[0]
        raise MissingPath(f"there is no tokenizer {name} that can be read: {reason}") from error
    if separator_of(tokenizer) is None:
        raise FormatError(f"the tokenizer {name} has no token that ends a text: give it an eos_token")
    found: PreTrainedTokenizerBase = tokenizer
    return found


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
    pieces: list[Tensor] = []
    for start in range(0, len(documents), 256):
        rows = tokenizer(list(documents[start : start + 256]), add_special_tokens=False, verbose=False)
        pieces += [torch.tensor([*row, separator], dtype=torch.int32) for row in rows["input_ids"]]
    packed = Packed(torch.cat(pieces), length)
    if not len(packed):
        raise DataError(f"{name} holds {len(packed.stream):,} tokens, less than one sequence of {length:,}")
    return packed


def collate(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return a batch of sequences, every token of which is predicted from those before it."""
    ids = torch.stack(list(rows)).long()
    return {"input_ids": ids, "labels": ids}
