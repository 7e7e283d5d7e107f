"""From settings to what a run needs before it trains: tokenizer, sequences, configuration."""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rankfold.errors import InvalidOption
from rankfold.pretrain.config import PretrainConfig
from rankfold.pretrain.model import adopt_tokenizer, model_config
from rankfold.pretrain.optimizers import check_optimizer, optimizer_options
from rankfold.pretrain.text import Corpus, read_corpus
from rankfold.pretrain.tokens import load_tokenizer, train_tokenizer
from rankfold.training.packed import Packed, collate, pack

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CALIBRATION_BATCHES = 32  # that starts and rank rules see where they read data


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Args:
        config: the settings with learning rate and vocabulary filled in.
        found: the model's configuration, with the tokenizer's vocabulary.
        tokenizer: of the text.
        corpus: the documents.
        training: sequences to train on.
        held_out: sequences of the text that is held out.
    """

    config: PretrainConfig
    found: "PretrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    corpus: Corpus
    training: Packed
    held_out: Packed

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed run has to find again: how much text there is, and its digest."""
        streams = (self.training.stream, self.held_out.stream)
        digest = hashlib.sha256(b"".join(stream.numpy().tobytes() for stream in streams)).hexdigest()
        return {
            "documents": len(self.corpus.training),
            "held_out_documents": len(self.corpus.held_out),
            "tokens": len(self.training.stream),
            "held_out_tokens": len(self.held_out.stream),
            "vocabulary": len(self.tokenizer),
            "sha256": digest,
        }

    def scored(self, processes: int = 1) -> Packed:
        """Return the sequences that the perplexity is measured on, as many for each process."""
        count = min(len(self.held_out), self.config.eval_blocks)
        whole = self.config.batch_size * processes
        if processes > 1 and count > processes:
            count -= count % (whole if count >= whole else processes)
        return self.held_out.first(count)

    def batches(self) -> list[dict[str, Any]]:
        """Return the first batches of the text."""
        size, count = self.config.batch_size, len(self.training)
        starts = range(0, min(count, CALIBRATION_BATCHES * size), size)
        rows = [[self.training[i] for i in range(start, min(start + size, count))] for start in starts]
        return [collate(each) for each in rows]


def prepare(config: PretrainConfig) -> Prepared:
    """Read the text, train or load its tokenizer, and pack it for the model.

    Raises:
        RankfoldError: when the settings, the text or the model do not allow it.
    """
    rate = check_optimizer(config.optimizer, optimizer_options(config.set))
    found = model_config(config)
    corpus = read_corpus(config.data, config.eval_data, config.held_out)
    tokenizer = _tokenizer(config, corpus, found.vocab_size)
    config = replace(config, lr=config.lr or rate)
    if config.tokenizer is None:
        config = replace(config, vocab=len(tokenizer))
    adopt_tokenizer(found, tokenizer)
    training = pack(corpus.training, tokenizer, config.length, corpus.name)
    apart = pack(corpus.held_out, tokenizer, config.length, "the text that is held out")
    return Prepared(config, found, tokenizer, corpus, training, apart)


def _tokenizer(config: PretrainConfig, corpus: Corpus, vocabulary: int) -> "PreTrainedTokenizerBase":
    if config.tokenizer is None:
        return train_tokenizer(corpus.training, config.vocab or vocabulary)
    if config.vocab is not None:
        raise InvalidOption("vocab is of a tokenizer that is trained, and --tokenizer names one; drop one")
    return load_tokenizer(config.tokenizer)
