"""`rankfold export`: the forms, what weighs an approximation, and bad input in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import rankfold as rf
from rankfold.cli.main import main
from rankfold.formats import portable

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def adapter(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter whose change is not of low rank."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    rf.adapt(model, "dora", rank=4, targets=["q_proj", "down_proj"])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return str(rf.save(model, tmp_path_factory.mktemp("adapters") / "dora"))


def test_text_weighs_the_approximation_and_both_errors_are_shown(
    adapter: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    command = ["export", adapter, "--format", "portable", "--rank", "2", "--json", "--out"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    plain = json.loads(capsys.readouterr().out)["rows"]
    assert main([*command, str(tmp_path / "data"), "--data", notes]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert portable.check(tmp_path / "data") == []
    for row, other in zip(rows, plain, strict=True):
        assert "output_error" not in other
        assert 0 < row["output_error"] < row["error"]
        assert row["error"] > other["error"]
    assert main(["export", adapter, "--rank", "2", "--data", notes, "--out", str(tmp_path / "shown")]) == 0
    shown = capsys.readouterr().out
    assert all(f"of outputs {row['output_error']:.3g}" in shown for row in rows)


def test_a_gguf_file_and_a_folder_of_one_are_written(adapter: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "notes.gguf"
    command = ["export", adapter, "--format", "gguf", "--rank", "2", "--dtype", "f16", "--out"]
    assert main([*command, str(file)]) == 0
    assert main([*command, str(tmp_path / "folder")]) == 0
    assert file.read_bytes() == (tmp_path / "folder" / "adapter.gguf").read_bytes()
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert "blk.0.attn_q.weight.lora_a" in names
    capsys.readouterr()
    assert main([*command, str(file)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*command, str(file), "--overwrite"]) == 0


def test_the_method_itself_is_written_unless_plain_lora_is_asked_for(
    adapter: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["export", adapter, "--out", str(tmp_path / "dora"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["exact"] is True
    assert json.loads((tmp_path / "dora" / "adapter_config.json").read_text())["use_dora"] is True
    assert main(["export", adapter, "--plain", "--out", str(tmp_path / "plain")]) == 2
    assert "not of low rank; pass rank= or max_error=" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data", "notes.txt"], "none is asked for"),
        (["--rank", "2", "--data", "missing.txt"], "there is no data file"),
        (["--dtype", "q4", "--format", "gguf"], "dtype must be one of f32, f16"),
        (["--rank", "2", "--max-error", "0.1"], "both choose the rank"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    options: list[str], sentence: str, adapter: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["export", adapter, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
