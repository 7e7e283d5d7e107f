"""Whatever is done to a file, reading it ends in changes or in one sentence, and runs nothing."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.adapters import lycoris, mixed, written
from formats.small import rewrite, saved
from formats.test_readers import (
    DIFFUSERS,
    KOHYA,
    PAIR,
    PEFT,
    SMALL,
    gguf_file,
    lora,
    normal,
    parts,
    peft_folder,
)
from hosts import blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import rankfold as rf
from rankfold.errors import FormatError, RankfoldError

MANY = settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one adapter of every form: a file or a folder."""
    import peft

    place = tmp_path_factory.mktemp("originals")
    for algorithm in ("lora", "loha", "lokr"):
        lycoris(place / f"{algorithm}.safetensors", algorithm, use_tucker=True)
    written(
        place / "diffusers.safetensors",
        lora("unet.to_q", PAIR, *DIFFUSERS) | lora("unet.to_k", SMALL, *DIFFUSERS),
        {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_k": 2}})},
    )
    sides = {f"blk.0.attn_q.weight.lora_{side}": (normal(4, 4).numpy(), None) for side in "ab"}
    gguf_file(place / "adapter.gguf", sides)
    for kind in ("lora", "loha", "lokr", "adalora", "gralora hybrid"):
        peft_folder(place / f"peft {kind}", parts(), PEFT[kind][0](peft))
    for method in ("lora", "vera"):
        saved(place / f"rankfold {method}", method)
    return {path.name: path for path in place.iterdir()}


FILES = ("lora.safetensors", "loha.safetensors", "lokr.safetensors", "diffusers.safetensors", "adapter.gguf")
FOLDERS = ("peft lora", "peft loha", "peft lokr", "peft adalora", "peft gralora hybrid")


def ends_in_a_sentence(path: Path, model: Any = None) -> None:
    """Assert that reading gives finite changes or raises one sentence."""
    for beside in (None, model):
        try:
            changes = rf.read_changes(path, beside)
        except RankfoldError:
            continue
        assert all(factor.isfinite().all() for pair in changes.pairs.values() for factor in pair)


@pytest.mark.parametrize("name", FILES)
@MANY
@given(data=st.data())
def test_truncated_and_changed_bytes(
    name: str, originals: dict[str, Path], tmp_path: Path, data: Any
) -> None:
    content = bytearray(originals[name].read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        # The head, where lengths and names are, more often than the numbers.
        last = len(content) - 1 if data.draw(st.booleans()) else min(len(content) - 1, 300)
        content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    keep = data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))
    file = tmp_path / name
    file.write_bytes(bytes(content[:keep]))
    ends_in_a_sentence(file, mixed())


VALUES = st.sampled_from(
    [None, True, 0, -1, 1.5, 10**12, 1e308, "x", "(", [], ["a"], {}, {"first": -3}, {"(": 1}, {"first": None}]
)


@pytest.mark.parametrize("name", FOLDERS)
@MANY
@given(data=st.data())
def test_changed_configurations_of_peft(
    name: str, originals: dict[str, Path], tmp_path: Path, data: Any
) -> None:
    folder = tmp_path / name
    shutil.copytree(originals[name], folder, dirs_exist_ok=True)
    configuration = json.loads((originals[name] / "adapter_config.json").read_text())
    keys = [*configuration, "unknown"]
    for _ in range(data.draw(st.integers(1, 3))):
        configuration[data.draw(st.sampled_from(keys))] = data.draw(VALUES)
    (folder / "adapter_config.json").write_text(json.dumps(configuration))
    ends_in_a_sentence(folder, parts())


SPOILS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda tensor: tensor.T if tensor.dim() == 2 else tensor.flatten(),
    "cut": lambda tensor: tensor[:1] if tensor.dim() else tensor.reshape(1),
    "empty": lambda tensor: tensor.reshape(-1)[:0],
    "one more dimension": lambda tensor: tensor[None],
    "a number": lambda tensor: tensor.to(torch.complex64).real.sum(),
    "nan": lambda tensor: tensor.to(torch.complex64).real * torch.nan,
    "infinite": lambda tensor: tensor.to(torch.complex64).real / 0,
    "whole numbers": lambda tensor: tensor.to(torch.complex64).real.long(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "small": lambda tensor: tensor.to(torch.complex64).real.to(torch.float8_e4m3fn),
    "half": lambda tensor: tensor.to(torch.complex64).real.half(),
}


@pytest.mark.parametrize("name", [*FILES[:4], *FOLDERS])
@MANY
@given(data=st.data())
def test_tensors_of_other_shapes_types_and_names(
    name: str, originals: dict[str, Path], tmp_path: Path, data: Any
) -> None:
    path = tmp_path / name
    if originals[name].is_dir():
        shutil.copytree(originals[name], path, dirs_exist_ok=True)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    source = originals[name] / file.name if path.is_dir() else originals[name]
    tensors = load_file(source)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        spoil = data.draw(st.sampled_from([*SPOILS, "gone", "renamed"]))
        value = tensors.pop(key)
        if spoil in SPOILS:
            tensors[key] = SPOILS[spoil](value)
        elif spoil == "renamed":
            tensors[data.draw(st.text(max_size=8)) + key[data.draw(st.integers(0, len(key))) :]] = value
        tensors = tensors or {"a": torch.ones(1)}
    written(file, tensors)
    ends_in_a_sentence(path, parts() if path.is_dir() else mixed())


@pytest.mark.parametrize("method", ["lora", "vera"])
@MANY
@given(data=st.data())
def test_changed_records_of_rankfold(
    method: str, originals: dict[str, Path], tmp_path: Path, data: Any
) -> None:
    folder = tmp_path / method
    shutil.copytree(originals[f"rankfold {method}"], folder, dirs_exist_ok=True)

    def change(record: dict[str, Any]) -> None:
        known = record["base"]["weights"][data.draw(st.sampled_from(record["targets"]))]
        places: list[tuple[dict[str, Any], str]] = [
            *((record, key) for key in record if key != "tensors"),
            *((record["recipe"], key) for key in record["recipe"]),
            *((known, key) for key in ("shape", "kind", "window")),
            *((record["ranks"], key) for key in record["ranks"]),
        ]
        place, key = data.draw(st.sampled_from(places))
        sizes = st.sampled_from([[8], [8, 0], [-8, 8], [10**9, 10**9], ["a", 8], [8, 8, 8], [2.0, 4]])
        place[key] = data.draw(VALUES | sizes)

    ends_in_a_sentence(rewrite(folder, change), blocks())


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63])
def test_a_huge_header_is_refused_without_being_read(length: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b'{"a.lora_up.weight":')
    with pytest.raises(FormatError, match="truncated or no safetensors file"):
        rf.read_changes(file)


@pytest.mark.parametrize("counts", [(2**60, 0), (0, 2**60), (2**63, 2**63)])
def test_huge_counts_of_a_gguf_file_are_refused_without_being_looped_over(
    counts: tuple[int, int], tmp_path: Path
) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(1000))
    with pytest.raises(FormatError, match="truncated or no GGUF file"):
        rf.read_changes(file)


@pytest.mark.parametrize("header", ["[]", "3", "{", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": 3}'])
def test_a_header_of_diffusers_that_says_something_else_is_refused(header: str, tmp_path: Path) -> None:
    tensors = lora("unet.to_q", PAIR, *DIFFUSERS)
    with pytest.raises(FormatError, match=r"header|patterns"):
        rf.read_changes(written(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": header}))


def test_a_small_file_never_becomes_a_huge_factor(tmp_path: Path) -> None:
    tensors = {f"lycoris_a.lokr_w{side}": torch.zeros(3000, 3000, dtype=torch.float16) for side in (1, 2)}
    with pytest.raises(FormatError, match="entries, which no layer has"):
        rf.read_changes(written(tmp_path / "a.safetensors", tensors))
    kernel = lora("lora_unet_a", PAIR, *KOHYA) | {"lora_unet_a.lora_mid.weight": normal(2, 2, 10, 10)}
    with pytest.raises(FormatError, match="do not multiply"):
        rf.read_changes(
            written(tmp_path / "b.safetensors", kernel | {"lora_unet_a.lora_up.weight": SMALL[0]})
        )
