"""Modules trained whole whose tensor another module shares."""

import copy
from pathlib import Path

import peft
import pytest
import transformers

import rankfold as rf
from rankfold.errors import Incompatible


def tied() -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config)


def test_their_export_to_peft_is_refused_because_peft_unties_them(tmp_path: Path) -> None:
    model = rf.adapt(tied(), "lora", rank=2, train=["lm_head"])
    with pytest.raises(Incompatible, match="shares its tensor with"):
        rf.export(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_their_import_from_peft_is_refused_likewise(tmp_path: Path) -> None:
    base = tied()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(Incompatible, match="shares its tensor with"):
        rf.load(base, tmp_path)
