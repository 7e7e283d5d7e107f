"""`rankfold pretrain`: what its words mean, and what it says."""

import json
import logging
from pathlib import Path

import pytest

from rankfold.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command that pretrains on a text of its own into `out`."""
    monkeypatch.setattr("rankfold.pretrain.run.draw_curves", lambda *args: None)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the number {i} is followed by {i + 1}" for i in range(300)), encoding="utf-8")
    flags = "--vocab 270 --length 16 --batch-size 4 --steps 2 --device cpu --held-out 0.2"
    return ["pretrain", "0.1M", "--data", str(text), "--out", str(tmp_path / "out"), *flags.split()]


def _refused(arguments: list[str], capture: Capture) -> str:
    capture.readouterr()
    assert main(arguments) == 2
    shown = capture.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("rankfold: ")
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--optimizer", "galroe"], "did you mean galore"),
        (["--optimizer", "galore", "--set", "optimizer.rnak=4"], "did you mean rank"),
        (["--optimizer", "galore", "--set", "optimizer.rank=abc"], "rank must be a whole number"),
        (["--vocab", "0"], "vocab is 0; it must be at least 1"),
        (["--data", ""], "it must be no empty name"),
        (["--tokenizer", ""], "it must be a name"),
        (["--optimizer", "galore", "--set", "optimizer.rank=400"], "projects no weight at rank 400"),
        (["--structure", "sltrain", "--rank", "400"], "400"),
        (["--structure", "lroa"], "'lroa'"),
        (["--set", "structure.density=0.1"], "needs a structure"),
        (["--vocab", "100000"], "supports a vocabulary of"),
        (["--vocab", "100"], "it needs 257"),
        (["--length", "5000"], "the model holds at most 1024"),
        (["--dtype", "float16"], "dtype is 'float16'; choose float32, bfloat16, mixed"),
        (["--warmup", "1"], "warmup is 1.0"),
        (["--steps", "2", "--epochs", "1"], "give one of them"),
        (["--batch-size", "100000"], "fewer than a batch of 100000"),
        (["--tokenizer", "none"], "vocab is of a tokenizer that is trained"),
        (["--fsdp"], "torchrun --nproc-per-node"),
        (["--data", "/none.txt"], "no file with text at /none.txt"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    flags: list[str], sentence: str, words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert sentence in _refused([*words, *flags], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "sentence"), [(b"", "is empty"), (b"\xff\xfe", "is not text")])
def test_a_file_that_is_empty_or_not_text_is_one_sentence(
    content: bytes, sentence: str, words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    assert f"bad.txt {sentence}" in _refused([*words, "--data", str(bad)], capsys)


def test_a_model_that_cannot_be_reached_is_one_sentence(
    words: list[str], capsys: Capture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("retrying in 1s [retry 1/5].")
        raise OSError("we could not connect")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    assert "no model folder nobody/none" in _refused(["pretrain", "nobody/none", *words[2:]], capsys)
    assert not caplog.records


def test_without_a_model_or_a_folder_it_says_what_to_write(words: list[str], capsys: Capture) -> None:
    assert "rankfold pretrain 1M --out FOLDER" in _refused(["pretrain"], capsys)
    assert "name one with --out" in _refused(["pretrain", "1M"], capsys)


def test_the_plan_is_said_before_and_the_result_after(
    words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main([*words, "--optimizer", "galore"]) == 0
    shown = capsys.readouterr()
    assert "memory " in shown.err
    assert "(predicted, of a step)" in shown.err
    assert "pretraining: 100%" in shown.err
    assert "held out 5." in shown.err
    assert "predicted     measured" in shown.out
    assert f"from_pretrained('{tmp_path / 'out'}')" in shown.out
    assert "is not empty" in _refused(words, capsys)
    assert main(["pretrain", "--out", str(tmp_path / "out"), "--resume", "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["config"]["optimizer"] == "galore"
    assert resumed == json.loads((tmp_path / "out" / "result.json").read_text())


def test_a_dry_run_writes_nothing_and_a_run_is_repeated_from_its_file(
    words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main([*words, "--dry-run", "--json", "--structure", "sltrain", "--rank", "4"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["modules"] == 14
    assert plan["memory"]["total"] > plan["memory"]["optimizer"] > plan["memory"]["gradients"]
    assert not (tmp_path / "out").exists()
    assert main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    again = ["pretrain", "--config", str(tmp_path / "out" / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"] == first["after"]
