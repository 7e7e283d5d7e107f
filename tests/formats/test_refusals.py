"""What is truncated, changed or made for another base is refused, and the model stays as it was."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.small import Untouched, edit_config, output, rewrite, saved
from hosts import Blocks, blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import rankfold as rf
from rankfold.errors import BaseMismatch, FormatError, MissingPath, RankfoldError
from rankfold.formats import native
from rankfold.formats.files import write_tensors
from rankfold.layers import StructuredLayer

METHODS = ("dora", "uni-lora", "vera", "reft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {method: saved(place / method, method, train=("lm_head",)) for method in METHODS}


@pytest.fixture(params=METHODS)
def adapter(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[request.param], tmp_path / "adapter"))


def refuses(folder: Path, error: type[Exception], sentence: str, model: nn.Module | None = None) -> None:
    """Assert that loading raises a sentence of one line and leaves the model alone."""
    base = Untouched(model)
    with pytest.raises(error, match=sentence) as caught:
        rf.load(base.model, folder)
    assert "\n" not in str(caught.value)
    base.check()


# Another base -----------------------------------------------------------------------------------------


def other_numbers() -> Blocks:
    torch.manual_seed(1)
    return Blocks().eval()


def test_a_base_with_other_numbers_is_refused(adapter: Path) -> None:
    refuses(adapter, BaseMismatch, "made for another base .Blocks.", other_numbers())


def test_a_base_of_which_one_weight_is_another_is_refused(folders: dict[str, Path]) -> None:
    model = blocks()
    model.blocks[1].up.weight.data = other_numbers().blocks[1].up.weight.data
    refuses(folders["dora"], BaseMismatch, "numbers of blocks.1.up are others", model)


def test_a_base_of_which_every_weight_is_a_little_off_is_refused(folders: dict[str, Path]) -> None:
    model = blocks()
    for parameter in model.parameters():
        parameter.data *= 1.5
    refuses(folders["dora"], BaseMismatch, "its weights' numbers are not those here", model)


def test_a_base_of_other_shapes_is_refused(folders: dict[str, Path]) -> None:
    model = blocks()
    model.blocks[0].up = nn.Linear(8, 13)
    refuses(folders["dora"], BaseMismatch, "blocks.0.up is 13x8 here and 12x8 in the adapter's base", model)


def test_a_base_without_one_of_the_places_is_refused(adapter: Path) -> None:
    model = blocks()
    del model.blocks[1]
    refuses(adapter, BaseMismatch, "a model that has blocks.1", model)


def test_a_base_without_a_module_trained_whole_is_refused(folders: dict[str, Path]) -> None:
    model = blocks()
    model.head = model.lm_head
    del model.lm_head
    refuses(folders["vera"], BaseMismatch, "a model that has lm_head", model)


def test_a_zero_base_is_told_from_another(tmp_path: Path) -> None:
    def zero() -> Blocks:
        model = blocks()
        for block in model.blocks:
            for layer in block.children():
                layer.weight.data.zero_()
        return model

    folder = rf.save(rf.adapt(zero(), "lora", rank=2), tmp_path / "adapter")
    refuses(folder, BaseMismatch, "made for another base")
    rf.load(zero(), folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_slightly_different_copy_of_the_base_is_accepted(method: str, folders: dict[str, Path]) -> None:
    model = blocks()
    for parameter in model.parameters():
        parameter.data += 0.02 * parameter.data.std() * torch.randn_like(parameter)
    rf.load(model, folders[method])


# Truncated and changed files --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_truncated_tensors_are_refused(adapter: Path, keep: float) -> None:
    file = adapter / native.TENSORS
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    refuses(adapter, FormatError, "truncated or was changed")


def test_one_changed_bit_of_the_tensors_is_refused(adapter: Path) -> None:
    file = adapter / native.TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    refuses(adapter, FormatError, "truncated or was changed")


@pytest.mark.parametrize("keep", [0, 1, 100, -3])
def test_a_truncated_record_is_refused(adapter: Path, keep: int) -> None:
    file = adapter / native.RECORD
    file.write_text(file.read_text()[:keep])
    refuses(adapter, FormatError, "is not valid JSON")


def test_a_changed_record_is_refused(adapter: Path) -> None:
    rewrite(adapter, lambda record: record.update(seed=record["seed"] + 1), signed=False)
    refuses(adapter, FormatError, "was changed after it was written")


def test_a_newer_format_is_refused_before_anything_else(adapter: Path) -> None:
    rewrite(adapter, lambda record: record.update(format_version=2, recipe="unknown today"), signed=False)
    refuses(adapter, FormatError, r"format version 2; this Rankfold reads up to 1: update it")


@pytest.mark.parametrize("version", [None, 0, -1, True, 1.0, "1", [1]])
def test_a_format_version_must_be_one(adapter: Path, version: Any) -> None:
    rewrite(adapter, lambda record: record.update(format_version=version))
    refuses(adapter, FormatError, "has no format version")


@pytest.mark.parametrize("file", [native.RECORD, native.TENSORS])
def test_a_missing_file_is_named(adapter: Path, file: str) -> None:
    (adapter / file).unlink()
    refuses(adapter, MissingPath, file)


def test_a_missing_folder_and_an_empty_one_are_named(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", MissingPath, "there is no folder .*nowhere")
    refuses(tmp_path, MissingPath, "holds neither rankfold.json nor adapter_config.json")


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("")
    refuses(tmp_path / "adapter", MissingPath, "there is no folder")


@pytest.mark.parametrize(
    "file",
    ["../other.safetensors", "/etc/passwd", "..", "", ".", "x" * 5000, "a\0b", "other.safetensors", None, 7],
)
def test_a_record_cannot_name_a_file_elsewhere(adapter: Path, file: Any) -> None:
    shutil.copy(adapter / native.TENSORS, adapter.parent / "other.safetensors")
    rewrite(adapter, lambda record: record["tensors"].update(file=file))
    refuses(adapter, FormatError, "does not name its tensor file")


def test_a_record_without_the_hash_of_its_tensors_is_refused(adapter: Path) -> None:
    rewrite(adapter, lambda record: record["tensors"].pop("sha256"))
    refuses(adapter, FormatError, "truncated or was changed")


def test_a_link_to_another_file_is_refused(adapter: Path) -> None:
    other = adapter.parent / "other.safetensors"
    save_file({"x": torch.ones(3)}, other)
    (adapter / native.TENSORS).unlink()
    (adapter / native.TENSORS).symlink_to(other)
    refuses(adapter, FormatError, "truncated or was changed")


def test_links_to_the_right_files_are_followed_as_in_the_cache_of_the_hub(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders["dora"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert torch.equal(output(rf.load(blocks(), tmp_path)), output(rf.load(blocks(), folders["dora"])))


def test_a_link_that_leads_to_itself_is_refused(adapter: Path) -> None:
    (adapter / native.TENSORS).unlink()
    (adapter / native.TENSORS).symlink_to(adapter / native.TENSORS)
    refuses(adapter, MissingPath, "lacks")


# Tensors that do not belong to the recipe, with hashes that fit ---------------------------------------


def resigned(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of an adapter folder, and the hash of their file with them."""
    file = folder / native.TENSORS
    tensors = load_file(file)
    change(tensors)
    write_tensors(file, tensors)
    return rewrite(folder, lambda record: record["tensors"].update(sha256=native.digest(file)))


def test_a_tensor_too_few_too_many_or_of_another_shape_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders["dora"], tmp_path / name))

    key = "blocks.0.up:up"
    refuses(resigned(copy("few"), lambda t: t.pop(key)), FormatError, f"lacks {key}")
    refuses(resigned(copy("many"), lambda t: t.update(x=t[key])), FormatError, "holds x")
    refuses(resigned(copy("wide"), lambda t: t.update({key: t[key].T})), FormatError, f"{key} has shape")


@pytest.mark.parametrize("rank", [0, -1, 10**9, 2**40, True, 2.0, "2", None, [2]])
def test_an_impossible_rank_is_refused(adapter: Path, rank: Any) -> None:
    rewrite(adapter, lambda record: record["ranks"].update(dict.fromkeys(record["ranks"], rank)))
    refuses(adapter, FormatError, "not consistent" if rank is None else "the impossible rank")


@pytest.mark.parametrize("number", [float("inf"), -1.0, 10**400, "1", None, True])
def test_a_fingerprint_of_impossible_numbers_never_passes(
    folders: dict[str, Path], tmp_path: Path, number: Any
) -> None:
    folder = Path(shutil.copytree(folders["dora"], tmp_path / "adapter"))
    file = folder / native.RECORD
    record = json.loads(file.read_text())
    for known in record["base"]["weights"].values():
        known["rms"] = number
    file.write_text(json.dumps(record).replace("Infinity", "1e999"))
    refuses(folder, FormatError, ".", other_numbers())


# Whatever stands in the record ------------------------------------------------------------------------

_SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 3, 2**31, 2**63, 2**80, 10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "", "lora", "\ud800", "\0", "(", "blocks.0.up", "default"])
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside plain data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return (
        [path, *(place for key, value in items for place in places(value, (*path, key)))]
        if path
        else [place for key, value in items for place in places(value, (key,))]
    )


def changed(record: dict[str, Any], draw: Callable[[Any], Any]) -> None:
    """Replace, remove or add something at one place of a record."""
    *path, last = draw(st.sampled_from(places(record)))
    inside: Any = record
    for key in path:
        inside = inside[key]
    action = draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "remove":
        del inside[last]
    elif action == "add" and isinstance(inside, dict):
        inside[draw(st.text(max_size=5))] = draw(_VALUES)
    else:
        inside[last] = draw(_VALUES)


def loads_or_refuses(folder: Path) -> None:
    """Assert that loading either works or raises an error of Rankfold's and leaves the model alone."""
    base = Untouched()
    try:
        rf.load(base.model, folder)
    except RankfoldError:
        base.check()
    else:
        assert any(isinstance(module, StructuredLayer) for module in base.model.modules()) or (
            "reft" in folder.name
        )


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60)
@given(data=st.data())
def test_no_change_of_the_record_raises_anything_else_or_touches_the_model(
    method: str, data: st.DataObject, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(folders[method], tmp_path_factory.mktemp("fuzz") / method))
    file = folder / native.RECORD
    record = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        changed(record, data.draw)
    if isinstance(record.get("tensors"), dict):
        with contextlib.suppress(RankfoldError):  # the hash is made to fit, to reach what stands behind it
            record["sha256"] = native.record_digest(record)
    file.write_bytes(json.dumps(record).encode("utf-8", "surrogatepass"))
    loads_or_refuses(folder)
    shutil.rmtree(folder)


@settings(max_examples=60)
@given(data=st.data())
def test_no_bytes_in_the_place_of_the_record_raise_anything_else(
    data: st.DataObject, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(folders["dora"], tmp_path_factory.mktemp("fuzz") / "dora"))
    file = folder / native.RECORD
    text = bytearray(file.read_bytes())
    start = data.draw(st.integers(0, len(text)))
    text[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    file.write_bytes(bytes(text))
    loads_or_refuses(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[]", "null", "\ufeff{}", "{" + " " * 100]
)
def test_deeply_nested_and_other_json_is_refused(adapter: Path, text: str) -> None:
    (adapter / native.RECORD).write_text(text)
    refuses(adapter, FormatError, "JSON")


def test_a_record_larger_than_any_is_not_read(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankfold.formats.files._LARGEST_JSON", 100)
    refuses(adapter, FormatError, "larger than any description")


def test_a_failure_while_the_tensors_are_copied_leaves_the_model_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(native, "fill", fail)
    base = Untouched()
    with pytest.raises(MemoryError):
        rf.load(base.model, folders["uni-lora"])
    base.check()


def test_peft_folders_that_are_spoiled_leave_the_model_alone(tmp_path: Path) -> None:
    model = rf.load(blocks(), saved(tmp_path / "native"))
    rf.export(model, tmp_path / "peft")
    refuses(edit_config(tmp_path / "peft", lora_alpha="much"), FormatError, "does not describe its tensors")
