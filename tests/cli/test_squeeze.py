"""`rankfold squeeze`, from a folder to a smaller one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rankfold as rf
from rankfold.cli.main import main
from rankfold.formats import portable
from rankfold.formats.changes import read_changes

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def adapter(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    model = AutoModelForCausalLM.from_pretrained(llama)
    rf.adapt(model, "lora", rank=6, targets=["q_proj", "down_proj"])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    rf.export(model, folder, "peft")
    return str(folder)


def test_every_weight_is_shown_with_both_ranks_and_its_error(
    adapter: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "small"
    assert main(["squeeze", adapter, "--rank", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    old, new = read_changes(adapter), read_changes(out)
    assert len(lines) == 2 + len(old.paths)
    for line, path in zip(lines[2:], old.paths, strict=True):
        values = torch.linalg.svdvals(old.dense(path))
        error = float(values[2:].norm() / values.norm())
        assert line.split() == [path, "6", "2", f"{error:.3g}"]
        assert new.rank(path) == 2
        lost = torch.linalg.matrix_norm(new.dense(path) - old.dense(path)) / values.norm()
        assert float(lost) == pytest.approx(error, rel=1e-4)


def test_json_says_the_same_and_a_portable_folder_is_one(
    adapter: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "small"
    command = ["squeeze", adapter, "--energy", "0.8", "--format", "portable", "--json", "--out", str(out)]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(out)
    assert report["weighted"] is False
    assert all(row["before"] == 6 and row["error"] <= 0.2**0.5 for row in report["rows"])
    assert portable.check(out) == []


def test_with_data_ranks_are_shared_out_by_the_errors_of_outputs(
    adapter: str, llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "small"
    flags = ["--rank", "3", "--share", "error", "--model", llama, "--data", notes, "--json"]
    assert main(["squeeze", adapter, *flags, "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["weighted"] is True
    assert len({row["after"] for row in report["rows"]}) > 1
    sizes = {"q_proj": 32 + 32, "down_proj": 64 + 32}
    spent = sum(row["after"] * sizes[row["weight"].rpartition(".")[2]] for row in report["rows"])
    assert spent <= 2 * 3 * sum(sizes.values())
    assert {p: read_changes(out).rank(p) for p in read_changes(out).paths} == {
        row["weight"]: row["after"] for row in report["rows"]
    }


def test_the_base_that_an_adapter_names_is_read_where_its_changes_depend_on_it(
    llama: str, tmp_path: Path, capsys: Capture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    rf.adapt(model, "dora", rank=3, targets=["q_proj"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "up" in name:
            torch.nn.init.normal_(parameter)
    rf.export(model, tmp_path / "dora", "peft")
    assert main(["squeeze", str(tmp_path / "dora"), "--rank", "2", "--out", str(tmp_path / "small")]) == 0
    assert "largest relative error of the change 0." in capsys.readouterr().out
    assert set(read_changes(tmp_path / "small").paths) == {
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }


def test_names_that_only_the_model_undoes_need_it(
    adapter: str, llama: str, tmp_path: Path, capsys: Capture
) -> None:
    file, out = str(tmp_path / "a.gguf"), tmp_path / "small"
    assert main(["export", adapter, "--model", llama, "--format", "gguf", "--out", file]) == 0
    capsys.readouterr()
    assert main(["squeeze", file, "--rank", "2", "--out", str(out)]) == 2
    assert "name it with --model" in capsys.readouterr().err
    assert not out.exists()
    assert main(["squeeze", file, "--rank", "2", "--model", llama, "--out", str(out)]) == 0
    assert set(read_changes(out).paths) == set(read_changes(adapter).paths)


def test_a_classifier_stays_one_and_can_be_exported_further(bert: str, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    rf.adapt(model, "lora", rank=3, targets=["query"])
    rf.save(model, tmp_path / "own")
    assert main(["squeeze", str(tmp_path / "own"), "--rank", "2", "--out", str(tmp_path / "small")]) == 0
    whole = read_changes(tmp_path / "small").whole
    assert {key.partition(".")[0] for key in whole} == {"classifier"}
    assert main(["export", str(tmp_path / "small"), "--out", str(tmp_path / "again")]) == 0
    assert read_changes(tmp_path / "again").whole.keys() == whole.keys()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "say how small it shall be"),
        (["--rank", "0"], "rank must be a whole number of at least 1"),
        (["--energy", "1.5"], "energy must lie in"),
        (["--rank", "2", "--energy", "0.5"], "each choose the rank"),
        (["--rank", "2", "--format", "dense"], "format must be one of peft, portable"),
        (["--rank", "2", "--data", "missing.txt"], "missing.txt"),
    ],
)
def test_wrong_words_are_one_sentence_and_leave_nothing(
    flags: list[str], sentence: str, adapter: str, llama: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["squeeze", adapter, "--out", str(out), *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(adapter: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "kept").write_text("x")
    assert main(["squeeze", adapter, "--rank", "2", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["squeeze", adapter, "--rank", "2", "--out", str(tmp_path), "--overwrite"]) == 0


def test_the_help_fits_a_screen(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["squeeze", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80
