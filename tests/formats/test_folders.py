"""Folders and files appear complete or not at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from battery import adapted_blocks, points
from formats.small import contents, output, saved
from hosts import blocks

import rankfold as rf
from rankfold.errors import FormatError, InvalidOption, OutputExists
from rankfold.formats import files, native
from rankfold.formats.files import complete_folder, read_json, write_json


def written(path: Path, text: str, **options: bool) -> None:
    with complete_folder(path, **options) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)


def fails_in_the_middle(path: Path, error: type[BaseException], **options: bool) -> None:
    with complete_folder(path, **options) as folder:
        (folder / "a").write_text("half")
        raise error


def read(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("a", "b")}


def test_a_folder_appears_with_everything_that_was_written(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "deep" / "folder") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "folder").exists()
    assert contents(tmp_path / "deep" / "folder") == {"a": b"1"}
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_middle_leaves_no_trace(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        fails_in_the_middle(tmp_path / "new" / "folder", error)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_error_in_the_middle_leaves_the_old_folder(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    written(tmp_path / "folder", "old")
    with pytest.raises(RuntimeError):
        fails_in_the_middle(tmp_path / "folder", RuntimeError, overwrite=True)
    assert read(tmp_path / "folder") == {"old"}
    written(tmp_path / "folder", "new", overwrite=True)
    assert read(tmp_path / "folder") == {"new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_folder_that_cannot_be_moved_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "folder", "old")
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    rename = Path.replace

    def fails_once(path: Path, target: Path) -> Path:
        if path.name.startswith(".folder.") and not path.name.endswith(".old"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fails_once)
    with pytest.raises(OSError, match="no"):
        written(tmp_path / "folder", "new", overwrite=True)
    assert read(tmp_path / "folder") == {"old"}
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two renames stand for the exchange")
def test_a_folder_is_replaced_in_one_step_and_never_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "folder", "old")
    rename = Path.replace

    def refuses_folders(path: Path, target: Path) -> Path:
        assert path.is_file(), f"{path.name} is moved, and for a moment there is no folder"
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", refuses_folders)
    written(tmp_path / "folder", "new", overwrite=True)
    assert read(tmp_path / "folder") == {"new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_folder_that_is_not_empty_is_only_replaced_when_asked(tmp_path: Path) -> None:
    written(tmp_path / "folder", "old")
    with pytest.raises(OutputExists, match="exists and is not empty; pass overwrite=True"):
        written(tmp_path / "folder", "new")
    assert read(tmp_path / "folder") == {"old"}
    (tmp_path / "empty").mkdir()
    written(tmp_path / "empty", "new")
    assert read(tmp_path / "empty") == {"new"}


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExists, match="is a file, not a folder"):
        written(tmp_path / "file", "new", overwrite=True)
    with pytest.raises(OutputExists, match="a part of its path is a file"):
        written(tmp_path / "file" / "folder", "new")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_in_which_one_works_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "inside").mkdir(parents=True)
    (tmp_path / "work" / "precious").write_text("mine")
    monkeypatch.chdir(tmp_path / "work" / "inside")
    for path in (Path(), Path(".."), tmp_path / "work"):
        with pytest.raises(OutputExists, match="is or holds the current folder"):
            written(path, "new", overwrite=True)
    assert (tmp_path / "work" / "precious").read_text() == "mine"
    written(Path("below"), "new")
    assert read(tmp_path / "work" / "inside" / "below") == {"new"}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    written(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    written(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == {"new"}


def test_a_file_is_replaced_whole_and_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "shared.json").write_text("{}")
    (tmp_path / "file.json").symlink_to(tmp_path / "shared.json")
    write_json(tmp_path / "file.json", {"a": 1})
    assert not (tmp_path / "file.json").is_symlink()
    assert (tmp_path / "shared.json").read_text() == "{}"
    with pytest.raises(FormatError, match="no plain data"):
        write_json(tmp_path / "file.json", {"a": object()})
    assert read_json(tmp_path / "file.json") == {"a": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.json", "shared.json"]


# Adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write_tensors", "write_text", "write_json", "digest"])
def test_a_save_that_fails_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(native, step, fail)
    with pytest.raises(OSError, match="the disk is full"):
        saved(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_while_overwriting_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "adapter")
    before, saved_again = contents(folder), adapted_blocks(points("dora")[0])
    with monkeypatch.context() as patched:
        patched.setattr(native, "write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            rf.save(saved_again, folder, overwrite=True)
    assert contents(folder) == before
    rf.save(saved_again, folder, overwrite=True)
    assert set(contents(folder)) == set(before)
    assert list(tmp_path.iterdir()) == [folder]


def test_an_adapter_is_only_overwritten_when_asked(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    before = contents(folder)
    with pytest.raises(OutputExists, match="is not empty"):
        saved(tmp_path / "adapter", "dora")
    assert contents(folder) == before


@pytest.mark.parametrize("format", ["peft", "portable", "dense"])
def test_an_export_that_fails_leaves_nothing(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("rankfold.formats.peft.write_json", fail)
    monkeypatch.setattr("safetensors.torch.save_model", fail)
    with pytest.raises(OSError, match="the disk is full"):
        rf.export(adapted_blocks(points("lora")[0]), tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_of_an_export_write_nothing(tmp_path: Path) -> None:
    model = adapted_blocks(points("lora")[0])
    for sentence, options in {
        "format must be one of peft, portable, dense": {"format": "gguff"},
        "rank must be at least 1": {"rank": 0},
        "max_error must lie between 0 and 1": {"max_error": 1.5},
        "both choose the rank": {"rank": 2, "max_error": 0.1},
        "the dense form is exact": {"format": "dense", "rank": 2},
    }.items():
        with pytest.raises(InvalidOption, match=sentence):
            rf.export(model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import sys, time
from pathlib import Path
import rankfold as rf
from rankfold.formats import native
from battery import adapted_blocks, points

def waits(path, data):
    Path(sys.argv[2]).write_text("in the middle")
    time.sleep(600)

native.write_json = waits
rf.save(adapted_blocks(points("dora")[0]), sys.argv[1], overwrite=True)
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_killed_save_leaves_the_old_adapter_or_none(there: bool, tmp_path: Path) -> None:
    folder, flag = tmp_path / "out" / "adapter", tmp_path / "flag"
    if there:
        saved(folder)
        before = contents(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(folder), str(flag)], env=environment)
    while not flag.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if there:
        assert contents(folder) == before
        output(rf.load(blocks(), folder))
    else:
        assert not folder.exists()
