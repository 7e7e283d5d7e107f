"""Tokenizers: trained on a text, or loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.errors import FormatError, InvalidOption, MissingPath
from rankfold.training.data import DataError
from rankfold.training.packed import separator_of

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
