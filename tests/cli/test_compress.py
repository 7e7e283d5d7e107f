"""`rankfold compress`: what its words mean, and what it says."""

import json
from pathlib import Path

import pytest

from rankfold.cli.main import main
from rankfold.compression import run as job
from rankfold.compression.ledger import Ledger
from rankfold.compression.objective import Solved
from rankfold.training.finished import load_finished

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def words(llama: str, notes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command that compresses a small decoder into `out`."""
    monkeypatch.setattr(job, "draw_spectra", lambda *args: None)
    flags = "--length 16 --batch-size 4 --device cpu --keep 0.6"
    return ["compress", llama, "--data", notes, "--out", str(tmp_path / "out"), *flags.split()]


def _refused(arguments: list[str], capture: Capture) -> str:
    capture.readouterr()
    assert main(arguments) == 2
    shown = capture.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("rankfold: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_help_fits_a_screen(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compress", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--keep", "0"], "keep is 0.0; it must be the share that remains, above 0 and at most 1"),
        (["--keep", "1.5"], "keep is 1.5"),
        (["--keep", "nan"], "keep is nan"),
        (["--method", "svd-lmm"], "did you mean svd-llm"),
        (["--targets", "qq_proj"], "qq_proj"),
        (["--set", "dampnig=0.1"], "did you mean damping"),
        (["--set", "damping=much"], "damping must be"),
        (["--set", "structure.alpha=1"], "an option of no axis here"),
        (["--form", "gguf"], "form is 'gguf'; choose expression, layers, dense"),
        (["--calibration", "twice"], "choose parallel, sequential"),
        (["--solver", "fast"], "choose exact, randomised"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--data", "none.txt"], "there is no data file or folder none.txt"),
        (["--eval-data", "none.tsv"], "there is no data file or folder none.tsv"),
        (["--text", "title"], "has no text column 'title'"),
        (["--length", "5000"], "length is 5000; the model holds at most 64"),
        (["--tokens", "9", "--samples", "9"], "give one of them"),
        (["--tokens", "32"], "the calibration data have 32 tokens, and its 64 inputs want at least as many"),
        (["--samples", "0"], "samples is 0; it must be at least 1"),
        (["--memory", "-1"], "memory is -1.0"),
        (["--resume", "--overwrite"], "choose one"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    flags: list[str], sentence: str, words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert sentence in _refused([*words, *flags], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--keep", "0.01"], "rank 1 in every weight takes"),
        (["--share", "unfair"], "'unfair'"),
        (["--share", "error", "--set", "share.relatve=true"], "relatve"),
    ],
)
def test_what_shows_only_while_compressing_leaves_no_model(
    flags: list[str], sentence: str, words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    assert main([*words, *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err.splitlines()[-1]
    assert not (tmp_path / "out" / "config.json").exists()
    assert main([*words, "--overwrite"]) == 0  # and is no run of somebody else's


def test_without_a_model_a_text_or_a_folder_it_says_what_to_write(words: list[str], capsys: Capture) -> None:
    assert "rankfold compress MODEL --data FILE --out FOLDER" in _refused(["compress"], capsys)
    assert "name it with --data" in _refused(["compress", words[1], "--out", "o"], capsys)
    assert "name one with --out" in _refused(words[:4], capsys)
    assert "no model folder ./nobody" in _refused(["compress", "./nobody", *words[2:]], capsys)


def test_the_plan_is_said_before_and_the_result_after(
    words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main([*words, "--set", "damping=0.1"]) == 0
    shown = capsys.readouterr()
    assert "the widest weight wants 64" in shown.err
    assert "weights    14 with 18,432 numbers" in shown.err
    assert "model.layers.0.self_attn.q_proj" in shown.out
    assert "perplexity" in shown.out
    assert "load_finished" in shown.out
    assert "is not empty" in _refused(words, capsys)
    assert main(["compress", "--out", str(tmp_path / "out"), "--resume", "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["options"]["damping"] == 0.1
    assert resumed == json.loads((tmp_path / "out" / "result.json").read_text())
    assert load_finished(tmp_path / "out")[0].model.layers[0].mlp.up_proj.expression is not None


def test_what_was_interrupted_goes_on_with_resume(
    words: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Ledger.__setitem__

    def kept(self: Ledger, path: str, found: Solved) -> None:
        if path.startswith("model.layers.1"):
            raise KeyboardInterrupt
        usual(self, path, found)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "__setitem__", kept)
        assert main(words) == 130
    assert "the same command continues with --resume" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()
    assert main([*words, "--keep", "0.5", "--resume"]) == 2
    assert "keep was 0.6" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_a_dry_run_writes_nothing_and_a_run_is_repeated_from_its_file(
    words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["weights"] == 14
    assert plan["budget"] == int(0.6 * plan["targeted_parameters"])
    assert plan["text"]["tokens"] >= plan["text"]["wanted_tokens"] == 64
    assert not (tmp_path / "out").exists()
    assert main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    again = ["compress", "--config", str(tmp_path / "out" / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"]["score"] == first["after"]["score"]
