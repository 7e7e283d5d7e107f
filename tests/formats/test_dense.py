"""A dense export and a folded model are stock checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from formats.small import MOVED, adapted, agree, sharp
from layers.models import logits, perturb
from safetensors.torch import load_model
from torch import nn

import rankfold as rf
from rankfold.errors import NotDense, UnsupportedLayer

METHODS = [
    m.name for m in rf.methods("structure") if not m.traits["activations"] and m.traits["gate"] is None
]
STOCK = {"llama": hf.AutoModelForCausalLM, "gpt2": hf.AutoModelForCausalLM,
         "bert": hf.AutoModelForSequenceClassification}  # fmt: skip


def reloaded(name: str, folder: Path) -> nn.Module:
    """Load a folder by transformers; a missing or unexpected tensor is an error."""
    model, notes = STOCK[name].from_pretrained(folder, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_dense_export_is_a_stock_checkpoint_with_the_same_logits(method: str, tmp_path: Path) -> None:
    ranked = rf.find_method(f"structure={method}").traits["rank"] is not None
    model = adapted("llama", method, **({"rank": 4} if ranked else {}))
    wanted = logits(model, "llama").detach()
    assert float((wanted - logits(sharp("llama"), "llama")).abs().max()) > MOVED
    report = rf.export(model, tmp_path / "out", "dense")
    agree(logits(reloaded("llama", tmp_path / "out"), "llama"), wanted)
    assert report.exact
    assert torch.equal(logits(model, "llama"), wanted)
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors"}
    assert not (tmp_path / "out" / "rankfold.json").exists()


@pytest.mark.parametrize("name", list(STOCK))
def test_a_folded_model_saves_a_stock_checkpoint(name: str, tmp_path: Path) -> None:
    model = adapted(name, "dora", rank=3)
    wanted = logits(model, name).detach()
    rf.fold(model).save_pretrained(tmp_path)
    agree(logits(reloaded(name, tmp_path), name), wanted)
    assert "save_pretrained" not in model.__dict__


def test_only_the_named_adapter_is_in_a_dense_export(tmp_path: Path) -> None:
    model = adapted("llama", rank=3, name="one")
    first = logits(model, "llama").detach()
    rf.adapt(model, "lora", rank=3, name="two")
    perturb(model, 0.2)
    both = logits(rf.use(model, ["one", "two"]), "llama").detach()
    rf.export(model, tmp_path / "one", "dense", name="one")
    agree(logits(reloaded("llama", tmp_path / "one"), "llama"), first)
    assert torch.equal(logits(model, "llama"), both)


def test_a_plain_module_is_exported_as_its_tensors(tmp_path: Path) -> None:
    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    model = rf.adapt(plain(), "lora", rank=2)
    perturb(model)
    rf.export(model, tmp_path / "out", "dense")
    other = plain()
    load_model(other, tmp_path / "out" / "model.safetensors")
    x = torch.randn(3, 6)
    agree(other(x), model(x))


def test_a_change_without_a_matrix_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    without = [m for m in rf.methods("structure") if m.name not in METHODS and not m.traits["needs"]]
    assert {m.name for m in without} >= {"alora", "reft", "mixture"}
    for method in without:
        with pytest.raises(NotDense, match=f"{method.name} (acts|differs)|differs from token to token"):
            rf.export(adapted("llama", method.name, **method.traits["example"]), tmp_path / "out", "dense")
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_model_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(16, 16))
    quantize_(model, Int8WeightOnlyConfig())
    rf.adapt(model, "lora", rank=2)
    perturb(model)
    x = torch.randn(2, 16)
    before = model(x)
    with pytest.raises(UnsupportedLayer, match="quantised form"):
        rf.export(model, tmp_path / "out", "dense")
    assert torch.equal(model(x), before)
    assert list(tmp_path.iterdir()) == []
