import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rankfold.errors import FormatError, InvalidOption, MissingPath
from rankfold.training.config import RunConfig, config_text, parse_options, read_config

FULL = RunConfig(
    model="m",
    data="d.csv",
    out="o",
    method="dora/pissa",
    rank=4,
    targets=("q_proj", "v_proj"),
    train=("norm",),
    set={"structure.alpha": 32, "init.steps": 1.5, "structure.name": "x"},
    task="classify",
    text="0",
    label="yes",
    labels=("no", "1"),
    eval_data="e.csv",
    lr=2e-5,
    steps=7,
    batch_size=3,
    accumulate=2,
    max_length=9,
    save_steps=2,
    seed=5,
    dtype="bfloat16",
    device="cpu",
)


@pytest.mark.parametrize("config", [FULL, RunConfig(model="m", data="d")])
def test_the_written_file_reads_back_as_the_same_settings(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config_text(config), encoding="utf-8")
    assert RunConfig(**read_config(file)) == config


def test_a_json_file_with_flag_spelling_and_short_numbers_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    content = {"model": "m", "data": "d", "batch-size": 4, "lr": "2e-4", "epochs": 2, "targets": "attention"}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert RunConfig(**read_config(file)) == RunConfig(
        "m", "d", batch_size=4, lr=2e-4, epochs=2.0, targets=("attention",)
    )


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("lr: 5e-4\nsteps: 10\n", encoding="utf-8")
    assert read_config(file) == {"lr": 5e-4, "steps": 10}


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("batchsize: 4", InvalidOption, "did you mean batch-size"),
        ("steps: 1.5", InvalidOption, "steps is 1.5; it must be of type int"),
        ("steps: yes", InvalidOption, "steps is True"),
        ("lr: fast", InvalidOption, "lr is 'fast'; it must be of type float"),
        ("method: [lora]", InvalidOption, "method is"),
        ("set: 3", InvalidOption, "table of axis.option"),
        ("- 1", FormatError, "not a table"),
        ("a: [", FormatError, "cannot be read"),
    ],
)
def test_a_config_file_that_cannot_be_meant_is_refused(
    text: str, error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(error, match=sentence):
        read_config(file)


def test_a_missing_config_file_is_named() -> None:
    with pytest.raises(MissingPath, match=r"nowhere\.yaml"):
        read_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task": "regress"}, "task is 'regress'; choose causal, classify"),
        ({"dtype": "int8"}, "choose float32, bfloat16, float16"),
        ({"device": "tpu"}, "choose auto, cpu, cuda"),
        ({"lr": 0.0}, "lr is 0.0; it must be a positive number"),
        ({"lr": math.nan}, "lr is nan"),
        ({"epochs": -1.0}, "epochs is -1.0"),
        ({"batch_size": 0}, "batch-size is 0; it must be at least 1"),
        ({"max_length": 1}, "max-length is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 1, "epochs": 1.0}, "epochs and steps"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        replace(RunConfig(model="m", data="d"), **changes)


def test_options_are_json_literals_or_else_text() -> None:
    given = ["a.x=1", "a.y=1e-3", "b.z=true", "b.w=null", "c.s=fast", "c.e=a=b", 'c.l=["q"]']
    assert parse_options(given) == {
        "a.x": 1,
        "a.y": 1e-3,
        "b.z": True,
        "b.w": None,
        "c.s": "fast",
        "c.e": "a=b",
        "c.l": ["q"],
    }


@pytest.mark.parametrize("assignment", ["alpha=1", "structure.alpha", "=1"])
def test_an_option_without_axis_or_value_is_refused(assignment: str) -> None:
    with pytest.raises(InvalidOption, match=r"write axis\.option=value"):
        parse_options([assignment])
