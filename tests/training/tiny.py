"""Tiny models with a tokenizer of their own, and small files of data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "a good film with a warm heart",
    "a bad film with a cold heart",
    "the dog sleeps and the fox waits",
    "user assistant says hello and good night",
)
# Marks the assistant's words, as templates for training do.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %} "
    "{% endfor %}"
)
HIDDEN, WIDE, LAYERS = 32, 64, 2


def tokenizer(*, beginning: str, end: str, closes: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words; `closes` puts `end` after every text, as BERT does."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", beginning, end]
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=special))
    words.post_processor = processors.TemplateProcessing(
        single=f"{beginning} $A {end}" if closes else f"{beginning} $A",
        special_tokens=[(token, words.token_to_id(token)) for token in (beginning, end)],
    )
    encoder = {"cls_token": beginning, "sep_token": end, "pad_token": "[PAD]"}
    roles = encoder if closes else {"bos_token": beginning, "eos_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", model_max_length=64, **roles)


def save_llama(folder: Path) -> str:
    """Save a decoder without a padding token, and return its folder."""
    words = tokenizer(beginning="<s>", end="</s>", closes=False)
    words.chat_template = CHAT_TEMPLATE
    words.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def save_bert(folder: Path) -> str:
    """Save an encoder without a task head, and return its folder."""
    words = tokenizer(beginning="[CLS]", end="[SEP]", closes=True)
    words.save_pretrained(folder)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as JSON lines, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def review_rows(count: int = 24) -> list[dict[str, Any]]:
    """Return reviews that one word decides."""
    return [
        {"text": f"a {mood} film with a {'warm' if mood == 'good' else 'cold'} heart", "label": mood}
        for mood in ["good", "bad"] * (count // 2)
    ]
