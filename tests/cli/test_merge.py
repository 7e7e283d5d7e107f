"""`rankfold merge`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from model_folders import Writer
from safetensors.torch import load_file
from torch import nn

import rankfold as rf
from rankfold.cli.main import app, main
from rankfold.formats.changes import read_changes

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Write a base and two models, one weight each."""
    write = Writer(tmp_path)
    values = {"base": 1.0, "one": 2.0, "two": 4.0}
    return [str(write(name, {"w": torch.full((5,), value)})) for name, value in values.items()]


def _refused(arguments: list[str], capture: Capture) -> str:
    """Run a command that must fail, and return its one sentence."""
    assert main(arguments) == 2
    shown = capture.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("rankfold: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_help_fits_a_screen(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["merge", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80


def test_models_are_merged_with_weights_and_options(
    folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    base, one, two = folders
    out = tmp_path / "out"
    method = ["--method", "task-arithmetic", "--weight", "0.5", "--weight", "1", "--set", "scale=2"]
    assert main(["merge", one, two, "--base", base, *method, "--dtype", "bfloat16", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "task-arithmetic: 2 merged, 1 tensors" in shown.out
    assert "bfloat16; the models are stored in float32" in shown.out
    merged = load_file(out / "model.safetensors")["w"]
    assert torch.equal(merged, torch.full((5,), 1 + 2 * (0.5 * 1 + 3), dtype=torch.bfloat16))


def test_json_is_the_only_thing_on_standard_output(
    folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words = ["merge", *folders[1:], "--method", "linear", "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["dtype"], told["path"]) == ("linear", "float32", str(tmp_path / "out"))
    assert told["rows"] == [{"tensor": "w", "change": 0.5}]


def test_a_file_of_mergekit_is_merged(folders: list[str], tmp_path: Path, capsys: Capture) -> None:
    base, one, two = folders
    file = tmp_path / "merge.yml"
    models = [{"model": base}, *({"model": m, "parameters": {"weight": 0.5}} for m in (one, two))]
    config = {"merge_method": "task_arithmetic", "base_model": base, "models": models}
    file.write_text(yaml.safe_dump(config))
    assert main(["merge", str(file), "--out", str(tmp_path / "out")]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], torch.full((5,), 3.0))
    capsys.readouterr()
    out = ["--out", str(tmp_path / "none")]
    assert "leave --method away" in _refused(["merge", str(file), *out, "--method", "ties"], capsys)
    assert "leave --weight away" in _refused(["merge", str(file), *out, "--weight", "1"], capsys)
    assert "leave --set away" in _refused(["merge", str(file), *out, "--set", "scale=1"], capsys)
    assert "pass it alone" in _refused(["merge", str(file), one, *out], capsys)
    file.write_text("merge_method: linear\nslices: []\n")
    assert "slices is not read" in _refused(["merge", str(file), *out], capsys)


def test_adapters_are_merged(tmp_path: Path, capsys: Capture) -> None:
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = rf.adapt(nn.Sequential(nn.Linear(4, 3)), "lora", rank=1, targets="0", seed=seed)
        nn.init.normal_(model[0].expression.leaf("up").value)
        rf.save(model, tmp_path / name)
    one, two, out = (str(tmp_path / name) for name in ("one", "two", "out"))
    assert main(["merge", one, two, "--method", "linear", "--rank", "1", "--out", out]) == 0
    assert "0: rank 1, relative error" in capsys.readouterr().out
    assert read_changes(out).rank("0") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--method names the rule"),
        (["--method", "tie"], "no merge is called 'tie'"),
        (["--method", "ties"], "pass base= (--base)"),
        (["--method", "linear", "--weight", "1"], "1 weights were given for 2 models"),
        (["--method", "linear", "--set", "normalize"], "write option=value"),
        (["--method", "linear", "--set", "normalise=true"], "did you mean normalize"),
        (["--method", "linear", "--set", "rank=3"], "that is no option of a method but --rank"),
        (["--method", "linear", "--dtype", "int4"], "dtype must be one of"),
        (["--method", "linear", "--base", "nowhere"], "there is no model folder nowhere"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    words: list[str], sentence: str, folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert sentence in _refused(["merge", *folders[1:], "--out", str(out), *words], capsys)
    assert not out.exists()


def test_models_that_differ_and_folders_that_are_there_are_one_sentence(
    folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    other = str(Writer(tmp_path)("other", {"w": torch.ones(6)}))
    words = ["merge", folders[0], other, "--method", "linear", "--out"]
    assert "w is 5 in the one and 6 in the other" in _refused([*words, str(tmp_path / "out")], capsys)
    assert "exists and is not empty" in _refused([*words, folders[1]], capsys)


@pytest.mark.parametrize(
    ("verb", "sentence"), [("merge", "nothing was written"), ("compress", "continues with --resume")]
)
def test_an_interruption_says_how_it_goes_on(
    verb: str, sentence: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> int:
        return 130

    monkeypatch.setattr(type(app), "__call__", interrupted)
    assert main([verb, "A"]) == 130
    assert sentence in capsys.readouterr().err
