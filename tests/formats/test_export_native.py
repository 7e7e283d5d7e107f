"""Methods that peft stores in a form of their own: written exactly, loaded by peft, and read back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.small import MOVED, adapted, agree, edit_config, in_peft, sharp
from layers.models import logits, perturb
from safetensors.torch import load_file, save_file

import rankfold as rf
from rankfold.errors import FormatError, Incompatible, InvalidOption
from rankfold.formats import native_peft as form
from rankfold.formats.files import read_json
from rankfold.layers import require
from rankfold.weights import Dense

NATIVE: list[tuple[str, dict[str, Any], str]] = [
    ("loha", {"rank": 3}, "LOHA"),
    ("loha", {"rank": 3, "alpha": 5}, "LOHA"),
    ("abba", {"rank": 2}, "LOHA"),
    ("lokr", {"rank": 1}, "LOKR"),
    ("lokr", {"rank": 1, "alpha": 3, "factor": 2}, "LOKR"),
    ("lokr", {"rank": 1, "decompose_both": True}, "LOKR"),
    ("hra", {"rank": 4}, "HRA"),
    ("hira", {"rank": 3}, "HIRA"),
    ("miss", {"rank": 3}, "MISS"),
    ("bone", {"rank": 4}, "MISS"),
    ("oft", {"block_size": 8}, "OFT"),
    ("boft", {"block_size": 4}, "OFT"),
    ("gralora", {"rank": 4}, "GRALORA"),
    ("gralora", {"rank": 4, "k": 4, "hybrid_rank": 2, "alpha": 3}, "GRALORA"),
]


def moved(method: str, options: dict[str, Any]) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapted("llama", method, **options)


@pytest.mark.parametrize(("method", "options", "kind"), NATIVE, ids=str)
def test_peft_and_rankfold_read_the_method_itself_with_the_same_logits(
    method: str, options: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    model = moved(method, options)
    wanted = logits(model, "llama").detach()
    assert float((wanted - logits(sharp("llama"), "llama").detach()).abs().max()) > MOVED
    report = rf.export(model, tmp_path / "out")
    assert report.exact
    assert report.largest_error == 0
    assert form.peft_type(report.method) == kind
    assert read_json(tmp_path / "out" / form.CONFIG)["peft_type"] == kind
    agree(logits(in_peft(tmp_path / "out", sharp("llama")), "llama"), wanted)
    agree(logits(rf.load(sharp("llama"), tmp_path / "out"), "llama"), wanted)
    assert torch.equal(logits(model, "llama"), wanted)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_ranks_and_scales_that_differ_become_patterns(method: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = rf.adapt(sharp("llama"), method, rank=12, alpha=5)
    perturb(model, 0.2)
    assert rf.export(model.eval(), tmp_path / "out").method != "LORA"
    wanted = logits(model, "llama")
    agree(logits(in_peft(tmp_path / "out", sharp("llama")), "llama"), wanted)
    agree(logits(rf.load(sharp("llama"), tmp_path / "out"), "llama"), wanted)


def test_a_head_that_was_trained_whole_goes_with_the_method(tmp_path: Path) -> None:
    model = adapted("bert", "loha", rank=2)
    rf.export(model, tmp_path / "out")
    assert read_json(tmp_path / "out" / form.CONFIG)["modules_to_save"] == ["classifier"]
    agree(logits(in_peft(tmp_path / "out", sharp("bert")), "bert"), logits(model, "bert"))
    agree(logits(rf.load(sharp("bert"), tmp_path / "out"), "bert"), logits(model, "bert"))


# What is no such file, becomes LoRA -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gralora", {"rank": 4}),
        ("hra", {"rank": 4}),
        ("loha", {"rank": 2}),
        ("vera", {"rank": 3}),
        ("miss", {"rank": 3}),
    ],
    ids=str,
)
def test_lora_is_written_where_the_method_itself_is_not_wanted(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted("llama", method, **options)
    report = rf.export(model, tmp_path / "out", native=False)
    assert report.exact
    assert report.method == "LORA"
    agree(logits(in_peft(tmp_path / "out", sharp("llama")), "llama"), logits(model, "llama"))


@pytest.mark.parametrize("method", ["hira", "oft", "dora"])
def test_a_change_of_full_rank_is_refused_as_lora(method: str, tmp_path: Path) -> None:
    model = adapted("llama", method)
    with pytest.raises(InvalidOption, match="not of low rank"):
        rf.export(model, tmp_path / "out", native=False)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_the_method_of_peft_does_not_know_makes_it_lora(tmp_path: Path) -> None:
    report = rf.export(adapted("gpt2", "hra", rank=4), tmp_path / "out")
    assert (report.method, report.exact) == ("LORA", True)


def test_a_butterfly_of_two_factors_and_one_with_a_scale_are_no_block_rotation(tmp_path: Path) -> None:
    for options in ({"factors": 2}, {"scaled": True}):
        model = adapted("llama", "boft", block_size=4, **options)
        with pytest.raises(InvalidOption, match="not of low rank"):
            rf.export(model, tmp_path / "out")


def test_what_differs_from_the_map_of_the_method_is_never_written_as_it() -> None:
    """LoRA's factors have the names and shapes of HiRA's, and a gate has no place in a file of LoHa."""
    adaptation = require(adapted("llama", "loha", rank=2))
    path, expression = next(iter(adaptation.expressions("default").items()))
    record, layers = adaptation.adapter(None).record, {path: adaptation.layers[path]}
    assert form.found(record, {path: expression}, layers) is not None
    next(expression.pairs()).owner.insert_gate(Dense(torch.full((2,), 0.5), "gate", trainable=True))
    assert form.found(record, {path: expression}, layers) is None
    plain = require(adapted("llama", "lora", rank=2))
    other = {**record, "recipe": {"structure": ["hira", {}]}}
    layers = {path: plain.layers[path]}
    assert form.found(other, {path: plain.expressions("default")[path]}, layers) is None


# Foreign and spoiled files ----------------------------------------------------------------------------


def written(tmp_path: Path, method: str = "loha", **options: Any) -> Path:
    rf.export(adapted("llama", method, **{"rank": 2, **options}), tmp_path / "out")
    return tmp_path / "out"


def test_a_tensor_that_is_missing_or_too_many_is_an_error(tmp_path: Path) -> None:
    folder = written(tmp_path)
    tensors = load_file(folder / form.TENSORS)
    first = next(iter(tensors))
    save_file({**tensors, "base_model.model.other": torch.ones(1)}, folder / form.TENSORS)
    with pytest.raises(FormatError, match=r"holds base_model.model.other, which is no part of a LOHA"):
        rf.load(sharp("llama"), folder)
    save_file({key: value for key, value in tensors.items() if key != first}, folder / form.TENSORS)
    with pytest.raises(FormatError):
        rf.load(sharp("llama"), folder)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("loha", {"use_something_new": True}),
        ("hra", {"apply_GS": True}),
        ("miss", {"init_weights": "mini"}),
    ],
)
def test_a_feature_that_would_be_lost_is_refused(method: str, change: dict[str, Any], tmp_path: Path) -> None:
    folder = edit_config(written(tmp_path, method), **change)
    with pytest.raises(Incompatible, match=next(iter(change))):
        rf.load(sharp("llama"), folder)


def test_a_rotation_by_a_cut_series_is_refused(tmp_path: Path) -> None:
    rf.export(adapted("llama", "oft"), tmp_path / "out")
    with pytest.raises(Incompatible, match="use_cayley_neumann"):
        rf.load(sharp("llama"), edit_config(tmp_path / "out", use_cayley_neumann=True))
