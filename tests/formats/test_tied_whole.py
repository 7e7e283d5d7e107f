"""Modules trained whole, or changed by other tools, whose tensor another module shares."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

import rankfold as rf
from rankfold.errors import Incompatible
from rankfold.layers import adaptation_of


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


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_change_by_peft_of_one_of_two_that_are_tied_is_refused(target: str, tmp_path: Path) -> None:
    base = tied()
    config = peft.LoraConfig(target_modules=[target])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(Incompatible, match="changes one of them alone; untie them first"):
        rf.load(base, tmp_path)
    assert adaptation_of(base) is None


def test_so_is_that_of_a_single_file(tmp_path: Path) -> None:
    base, file = tied(), tmp_path / "a.safetensors"
    save_file(
        {"lm_head.lora_up.weight": torch.ones(32, 1), "lm_head.lora_down.weight": torch.ones(1, 16)}, file
    )
    with pytest.raises(Incompatible, match="changes one of them alone; untie them first"):
        rf.load(base, file)
    assert adaptation_of(base) is None


@pytest.mark.parametrize(
    ("target", "other"), [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")]
)
def test_a_change_of_both_is_not_written_as_one_of_either(target: str, other: str, tmp_path: Path) -> None:
    base = tied()
    rf.save(rf.adapt(copy.deepcopy(base), "lora", rank=2, targets=[target]), tmp_path / "own")
    for read in (rf.read_changes(tmp_path / "own"), rf.read_changes(tmp_path / "own", base)):
        with pytest.raises(Incompatible, match=f"{other} shares its tensor with"):
            read.save(tmp_path / "peft")
    with pytest.raises(Incompatible, match=f"{other} shares its tensor with"):
        rf.squeeze(tmp_path / "own", rank=1, out=tmp_path / "peft")
    with pytest.raises(Incompatible, match=f"{other} shares its tensor with"):
        rf.merge([tmp_path / "own"] * 2, "linear", out=tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
