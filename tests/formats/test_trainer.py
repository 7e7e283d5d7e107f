"""Checkpoints of transformers' Trainer: they hold the adapter, and a run continues from them bit for bit."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from formats.small import Untouched, adapted, sharp
from layers.models import VOCABULARY, llama, logits, perturb
from safetensors.torch import load_file
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import FormatError, InvalidOption, OutputExists
from rankfold.formats import native
from rankfold.layers import require

POINTS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "dropout": 0.1},
    "vera": {"rank": 8},
    "uni-lora": {"rank": 3},
    "dora": {"rank": 3},
    "lora/pissa": {"rank": 3},
    "reft": {"rank": 3},
}


BEST: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
}  # fmt: skip


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    drawn = torch.randint(3, VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def fresh(method: str, **options: Any) -> nn.Module:
    """Return an adapted model as a new process would make it."""
    torch.manual_seed(0)
    return rf.adapt(llama(initializer_range=0.2), method, **{**POINTS[method], **options})


def trainer(model: nn.Module, folder: Path, **options: Any) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "seed": 5,
            **options,
        },
    )  # fmt: skip
    return hf.Trainer(model, arguments, train_dataset=rows(12), eval_dataset=rows(4, seed=1))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return what the adapter of a model holds."""
    return {key: value.clone() for key, value in native.tensors_of(require(model), "default").items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert list(first) == list(second)
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", POINTS)
def test_a_resumed_run_ends_with_the_same_weights(method: str, tmp_path: Path) -> None:
    whole = fresh(method, train=["lm_head"])
    trainer(whole, tmp_path / "whole").train()
    assert not same(trained(whole), trained(fresh(method, train=["lm_head"])))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = fresh(method, seed=0, train=["lm_head"])
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert same(trained(resumed), trained(whole))
    assert same(trained(rf.load(sharp_base(), tmp_path / "whole" / "checkpoint-6")), trained(whole))


def sharp_base() -> nn.Module:
    torch.manual_seed(0)
    return llama(initializer_range=0.2)


@pytest.mark.parametrize("method", POINTS)
def test_a_checkpoint_holds_the_adapter_and_not_the_base(method: str, tmp_path: Path) -> None:
    model = fresh(method)
    trainer(model, tmp_path, max_steps=1, save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    names = {file.name for file in checkpoint.iterdir()}
    assert {"rankfold.json", "model.safetensors", "README.md", "trainer_state.json", "optimizer.pt"} <= names
    assert not names & {"config.json", "generation_config.json", "pytorch_model.bin"}
    tensors = load_file(checkpoint / "model.safetensors")
    assert same(dict(sorted(tensors.items())), dict(sorted(trained(model).items())))
    whole = sum(p.numel() for p in sharp_base().parameters())
    assert sum(t.numel() for t in tensors.values()) < whole
    with pytest.raises((OSError, ValueError)):
        hf.AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("method", ["lora", "vera", "uni-lora", "dora"])
def test_the_best_model_is_loaded_at_the_end(method: str, tmp_path: Path) -> None:
    model = fresh(method)
    run = trainer(
        model, tmp_path, **BEST, learning_rate=0.3, greater_is_better=method in ("vera", "uni-lora")
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    last = rf.load(sharp_base(), tmp_path / "checkpoint-4")
    assert best.name != "checkpoint-4"  # else the last step is the best, and nothing is shown
    assert same(trained(model), trained(rf.load(sharp_base(), best)))
    assert not same(trained(model), trained(last))
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)


def test_a_final_model_is_saved_as_an_adapter_and_continued(tmp_path: Path) -> None:
    model = fresh("dora")
    run = trainer(model, tmp_path / "run", save_strategy="no", max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert same(trained(rf.load(sharp_base(), tmp_path / "final")), trained(model))
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert same(trained(rf.load(sharp_base(), tmp_path / "final")), trained(model))


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    trainer(fresh("lora"), tmp_path, max_steps=1, save_steps=1).train()
    other = fresh("lora", rank=2)
    before = trained(other)
    with pytest.raises(FormatError, match="has shape"):
        trainer(other, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(trained(other), before)


# A model without save_pretrained ----------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.head(torch.tanh(self.body(self.embed(input_ids))))
        return {"loss": nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten()), "logits": out}


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "uni-lora"])
def test_a_plain_module_resumes_with_the_same_weights(method: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return rf.adapt(Plain(), method, **{**POINTS[method], "targets": ["body", "embed"]})

    whole = model()
    trainer(whole, tmp_path / "whole").train()
    assert not same(trained(whole), trained(model()))
    resumed = model()
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=checkpoint)
    assert same(trained(resumed), trained(whole))


def test_a_plain_module_loads_its_best_state_at_the_end(tmp_path: Path) -> None:
    model = rf.adapt(Plain(), "dora", rank=3, targets="body")
    run = trainer(model, tmp_path, **BEST, learning_rate=3.0)
    run.train()
    assert Path(run.state.best_model_checkpoint).name != "checkpoint-4"
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)


# save_pretrained and load_state_dict ------------------------------------------------------------------


def test_save_pretrained_writes_what_load_reads(tmp_path: Path) -> None:
    model = adapted("llama", "dora", rank=3)
    model.save_pretrained(tmp_path / "out", safe_serialization=True, max_shard_size="1GB")
    assert torch.equal(logits(rf.load(sharp("llama"), tmp_path / "out"), "llama"), logits(model, "llama"))
    model.save_pretrained(tmp_path / "not main", is_main_process=False)
    assert not (tmp_path / "not main").exists()


def test_save_pretrained_keeps_what_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    adapted("llama", rank=3).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_save_pretrained_refuses_several_adapters_and_none(tmp_path: Path) -> None:
    model = adapted("llama", rank=3, name="one")
    rf.adapt(model, "lora", rank=2, name="two")
    rf.use(model, ["one", "two"])
    with pytest.raises(InvalidOption, match=r"\['one', 'two'\] are active; use rankfold.save.*rankfold.fold"):
        model.save_pretrained(tmp_path / "out")
    with rf.disabled(model), pytest.raises(InvalidOption, match=r"\[\] are active"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(InvalidOption, match=r"rankfold\.save"):
        rf.use(model, "one").save_pretrained(tmp_path / "out", push_to_hub=True)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "rankfold.json").read_text())["name"] == "one"


def test_an_adapter_is_never_put_beside_the_config_of_a_whole_model(tmp_path: Path) -> None:
    sharp("llama").save_pretrained(tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    with pytest.raises(OutputExists, match=r"holds the config\.json of a whole model"):
        adapted("llama", rank=3).save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExists, match="is a file"):
        adapted("llama", rank=3).save_pretrained(tmp_path / "file")


def test_a_save_that_is_interrupted_over_an_old_checkpoint_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted("llama", rank=3).save_pretrained(tmp_path)

    def fail(*args: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(native, "write_json", fail)
    with pytest.raises(OSError, match="disk is full"):
        adapted("llama", rank=3, seed=4).save_pretrained(tmp_path)
    base = Untouched(sharp("llama"))
    with pytest.raises(FormatError, match="truncated or was changed"):
        rf.load(base.model, tmp_path)
    base.check()


@pytest.mark.parametrize("end", ["remove", "fold"])
def test_the_stock_methods_are_back_after_the_last_adapter(end: str, tmp_path: Path) -> None:
    model = adapted("llama", rank=3, name="one")
    rf.adapt(model, "lora", rank=2, name="two")
    rf.remove(model, "two")
    assert "save_pretrained" in model.__dict__
    wanted = logits(rf.fold(model) if end == "fold" else rf.remove(model), "llama")
    assert not {"save_pretrained", "load_state_dict"} & set(model.__dict__)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), wanted)
    rf.adapt(model, "lora", rank=2)
    assert "save_pretrained" in model.__dict__


def test_a_copy_saves_and_loads_its_own_weights(tmp_path: Path) -> None:
    model = adapted("llama", rank=3)
    before = trained(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        perturb(copied, 0.5, seed=9)
        folder = tmp_path / str(id(copied))
        copied.save_pretrained(folder)
        assert same(trained(rf.load(sharp("llama"), folder)), trained(copied))
        copied.load_state_dict(before)
        assert same(trained(copied), before)
        perturb(copied, 0.5, seed=10)
        assert same(trained(model), before)


def test_a_stock_state_dict_still_loads_into_an_adapted_model() -> None:
    model, other = adapted("llama", rank=3), sharp("llama")
    other.model.norm.weight.data.fill_(2)
    before = trained(model)
    notes = model.load_state_dict(other.state_dict(), strict=False)
    assert not notes.unexpected_keys
    assert all("adapters" in key for key in notes.missing_keys)
    assert torch.equal(model.model.norm.weight, torch.full((16,), 2.0))
    assert same(trained(model), before)
    model.load_state_dict(model.state_dict())


def test_an_adapters_tensors_are_loaded_all_or_none() -> None:
    model = adapted("llama", rank=3)
    before = trained(model)
    wrong = {key: value + 1 for key, value in before.items()}
    last = list(wrong)[-1]
    wrong[last] = torch.ones(1)
    with pytest.raises(FormatError, match=f"{last} has shape"):
        model.load_state_dict(wrong)
    assert same(trained(model), before)


def test_an_adapted_model_is_pushed_as_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pushed = adapted("llama", rank=3), {}

    def upload(folder: str, repository: str, **options: Any) -> str:
        pushed[repository] = rf.load(sharp("llama"), folder)
        return "done"

    monkeypatch.setattr(type(model), "_upload_modified_files", staticmethod(upload))
    hub = "transformers.utils.hub"
    created = type("Created", (), {"repo_id": "me/adapter"})
    monkeypatch.setattr(f"{hub}.hf_api", lambda: type("Api", (), {"create_repo": lambda *_, **__: created})())
    card = type("Card", (), {"save": lambda self, path: None})()
    monkeypatch.setattr(f"{hub}.create_and_tag_model_card", lambda *_, **__: card)
    model.push_to_hub("me/adapter")
    assert same(trained(pushed["me/adapter"]), trained(model))
