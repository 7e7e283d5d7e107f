import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankfold as rf
from rankfold.cli.main import main

Capture = pytest.CaptureFixture[str]

FLAGS = ["--rank", "2", "--steps", "2", "--batch-size", "4", "--max-length", "16", "--device", "cpu"]


def _refused(arguments: list[str], capture: Capture) -> str:
    """Run a command that must fail, and return its one sentence."""
    assert main(arguments) == 2
    shown = capture.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("rankfold: ")
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize("verb", ["adapt", "pretrain", "methods", "export", "fold"])
def test_help_fits_a_screen(verb: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["--help", "--version"])
def test_the_program_introduces_itself(name: str, capsys: Capture) -> None:
    assert main([name]) == 0
    assert capsys.readouterr().out.strip()


def test_without_words_the_verbs_are_listed(capsys: Capture) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("adapt", "pretrain", "methods", "export", "fold"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["adapt", "--bogus"], "No such option: --bogus"),
        (["adapt", "m", "--rank", "two"], "Invalid value for '--rank'"),
        (["adapt"], "no model is given"),
        (["adapt", "m"], "no data is given"),
        (["fold"], "Missing argument"),
        (["fold", "a"], "Missing option '--out'"),
        (["adapt", "m", "--data", "d", "--config", "missing.yaml"], "there is no config file missing.yaml"),
        (["adapt", "m", "--data", "d", "--lr", "nan", "--out", "o"], "lr is nan"),
        (["adapt", "m", "--data", "d", "--set", "alpha=1", "--out", "o"], "write axis.option=value"),
        (["adapt", "m", "--data", "d"], "a run needs a folder"),
        (["methods", "lroa"], "lora"),
        (["methods", "--axis", "shape"], "no method is on the axis 'shape'"),
    ],
)
def test_wrong_words_are_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: Capture
) -> None:
    assert sentence in _refused(arguments, capsys)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--method", "lroa"], "'lroa'; did you mean"),
        (["--targets", "qq_proj"], "qq_proj"),
        (["--rank", "0"], "rank"),
        (["--rank", "-3"], "rank"),
        (["--rank", "1000", "--targets", "re:.*q_proj"], "rank 1000"),
        (["--set", "structure.alpha=NaN"], "alpha"),
        (["--set", "structure.alhpa=1"], "alhpa"),
        (["--max-length", "4096"], "max-length is 4096"),
        (["--task", "classify"], "no label column 'label'"),
        (["--dtype", "float16"], "float16 trains on a GPU only"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence_and_leave_nothing(
    flags: list[str], sentence: str, llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    line = _refused(["adapt", llama, "--data", notes, "--out", str(out), *FLAGS, *flags], capsys)
    assert sentence in line
    assert not out.exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
@pytest.mark.parametrize(("method", "inputs"), [("kind", "classes"), ("lora-composer", "regions")])
def test_methods_whose_gates_read_more_than_data_are_refused_before_the_model_is_read(
    method: str, inputs: str, dry: list[str], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    files = [str(tmp_path / "no-model"), "--data", str(tmp_path / "no-data.csv")]
    command = ["adapt", *files, "--out", str(out), "--method", method, *dry]
    line = _refused(command, capsys)
    assert line.startswith(f"rankfold: {method} reads {inputs}, ")
    assert f"rankfold.gate_inputs(model, {inputs}=...)" in line
    assert not out.exists()


def test_bad_data_and_models_are_one_sentence(
    llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": ')
    out = ["--out", str(tmp_path / "out"), *FLAGS]
    for model, data, sentence in (
        (llama, str(empty), "is empty"),
        (llama, str(broken), "cannot be read"),
        (llama, str(tmp_path / "missing.csv"), "there is no data file"),
        (str(tmp_path / "no-model"), notes, "there is no model folder"),
    ):
        assert sentence in _refused(["adapt", model, "--data", data, *out], capsys)


def test_json_is_the_only_thing_on_standard_output(
    llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["adapt", llama, "--data", notes, "--out", str(out), *FLAGS, "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result == json.loads((out / "result.json").read_text())
    assert result["next"].startswith("rankfold fold ")
    assert "loss" in shown.err


def test_the_summary_says_what_happened_and_its_next_command_works(
    llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["adapt", llama, "--data", notes, "--out", str(out), *FLAGS]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["trained", "time", "memory", "before", "after", "measured", "files", "next"]
    assert main(lines["next"].split()[1:]) == 0
    assert (tmp_path / "out-folded" / "model.safetensors").exists()


def test_the_next_command_of_a_memory_absorbs_it(
    llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    command = ["adapt", llama, "--data", notes, "--out", str(out), *FLAGS, "--method", "locas", "--json"]
    assert main(command) == 0
    words = shlex.split(json.loads(capsys.readouterr().out)["next"])
    assert words[:2] == ["python", "-c"]
    assert "rankfold.absorb(" in words[2]
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    base, absorbed = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (llama, tmp_path / "out-absorbed")
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    assert absorbed.config.intermediate_size == base.config.intermediate_size + 2
    torch.testing.assert_close(absorbed(ids).logits, rf.load(base, out)(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out-absorbed")


def test_a_run_is_repeated_from_its_file_and_flags_win(
    llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    given = ["--set", "structure.alpha=4", "--targets", "attention", "--method", "dora"]
    assert main(["adapt", llama, "--data", notes, "--out", str(first), *FLAGS, *given]) == 0
    again = [
        "adapt",
        "--config",
        str(first / "config.yaml"),
        "--out",
        str(second),
        "--set",
        "structure.dropout=0",
    ]
    assert main(again) == 0
    one, two = (json.loads((out / "result.json").read_text()) for out in (first, second))
    assert one["after"] == two["after"]
    assert two["config"]["set"] == {"structure.alpha": 4, "structure.dropout": 0}
    assert two["config"]["method"] == "dora"


def test_a_finished_run_is_resumed_by_its_folder_alone(
    llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    out = str(tmp_path / "out")
    command = ["adapt", llama, "--data", notes, "--out", out, *FLAGS]
    assert main(command) == 0
    assert "is not empty" in _refused_after(command, capsys)
    assert main(["adapt", "--out", out, "--resume"]) == 0
    assert "rank was 2" in _refused_after([*command, "--rank", "1", "--resume"], capsys)


def _refused_after(arguments: list[str], capture: Capture) -> str:
    capture.readouterr()
    return _refused(arguments, capture)


def test_a_dry_run_shows_modules_and_memory_and_writes_nothing(
    llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    command = ["adapt", llama, "--data", notes, "--out", str(tmp_path / "out"), "--dry-run", *FLAGS]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "q_proj" in shown
    assert "memory" in shown
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["modules"][0]["rank"] == 2
    assert plan["memory"]["total"] > plan["memory"]["weights"] > 0
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_the_catalogue_is_a_method(
    llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    method = ["--method", "ecg-lora", *FLAGS]
    command = ["adapt", llama, "--data", notes, "--out", str(tmp_path / "out"), *method]
    assert main([*command, "--set", "structure.alpha=4", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    names = {module["path"].rpartition(".")[2] for module in plan["modules"]}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["method"] == "ecg-lora"


def test_the_catalogue_is_listed_and_every_method_has_a_page(capsys: Capture) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(entry["axis"], entry["name"]) for entry in listed] == [(m.axis, m.name) for m in rf.methods()]
    assert main(["methods", "--axis", "init", "--json"]) == 0
    assert {entry["axis"] for entry in json.loads(capsys.readouterr().out)} == {"init"}
    for method in rf.methods():
        assert main(["methods", f"{method.axis}={method.name}"]) == 0
        page = capsys.readouterr().out
        assert method.formula in page
        assert method.title in page
        assert all(f"{method.axis}.{option}=" in page for option in method.options)


def test_a_method_is_found_by_its_paper(capsys: Capture) -> None:
    assert main(["methods", "2405.17604"]) == 0
    assert capsys.readouterr().out.startswith("lora-xs\n")


def test_the_catalogue_is_one_line_per_method_where_no_terminal_reads_it(capsys: Capture) -> None:
    assert main(["methods"]) == 0
    shown = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert shown == [[m.name, m.axis, str(m.year), m.formula, m.title] for m in rf.methods()]


def test_the_catalogue_is_a_table_with_a_head_on_a_terminal(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert "formula" in shown.splitlines()[0]
    assert all(method.name in shown for method in rf.methods())


def test_an_adapter_is_exported_and_bad_ones_are_one_sentence(
    llama: str, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["adapt", llama, "--data", notes, "--out", str(out), *FLAGS]) == 0
    capsys.readouterr()
    peft = tmp_path / "peft"
    assert main(["export", str(out), "--format", "peft", "--out", str(peft), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["exact"] is True
    assert (peft / "adapter_config.json").exists()
    command = ["export", str(out), "--out"]
    assert "is not empty" in _refused([*command, str(peft)], capsys)
    assert "onnx" in _refused([*command, str(tmp_path / "x"), "--format", "onnx"], capsys)
    assert "there is no model folder" in _refused(
        [*command, str(tmp_path / "x"), "--model", "/missing"], capsys
    )
    assert "missing" in _refused(["fold", str(tmp_path / "missing"), "--model", llama, "--out", "x"], capsys)
    other = tiny.save_bert(tmp_path / "other")
    assert main([*command, str(tmp_path / "x"), "--model", other]) == 2
    weights = out / "rankfold.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    capsys.readouterr()
    _refused([*command, str(tmp_path / "x")], capsys)
    assert not (tmp_path / "x").exists()


def test_a_library_that_is_not_installed_is_named(
    llama: str, notes: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = _refused(["adapt", llama, "--data", notes, "--out", str(tmp_path / "out"), *FLAGS], capsys)
    assert "this needs datasets: pip install 'rankfold[cli,transformers]'" in line


def test_an_interruption_is_one_sentence_and_exit_code_130(
    llama: str, notes: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupt)
    assert main(["adapt", llama, "--data", notes, "--out", str(tmp_path / "out"), *FLAGS]) == 130
    assert "continues with --resume" in capsys.readouterr().err
