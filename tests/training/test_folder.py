from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rankfold.errors import InvalidOption, OutputExists
from rankfold.training.config import RunConfig, read_config
from rankfold.training.folder import RunFolder
from rankfold.training.whole import NotWritten

CONFIG = RunConfig(model="m", data="d", rank=8)


def _checkpoint(folder: RunFolder, step: int, state: str | None = "{}") -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_a_folder_that_is_not_empty_is_refused_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExists, match="is not empty; choose another or add --overwrite"):
        RunFolder(tmp_path).check(resume=False, overwrite=False)
    with pytest.raises(OutputExists, match="holds no run to resume"):
        RunFolder(tmp_path).check(resume=True, overwrite=False)
    (tmp_path / "config.yaml").write_text("model: m")
    RunFolder(tmp_path).check(resume=False, overwrite=True)
    RunFolder(tmp_path).start(CONFIG, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_no_run_began_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("years of work")
    with pytest.raises(OutputExists, match="no run to overwrite"):
        RunFolder(tmp_path).check(resume=False, overwrite=True)
    (tmp_path / "checkpoints").mkdir()  # as a run leaves it that ended before its settings were written
    RunFolder(tmp_path).check(resume=False, overwrite=True)


def test_an_empty_or_new_folder_is_taken(tmp_path: Path) -> None:
    for resume in (False, True):
        RunFolder(tmp_path).check(resume=resume, overwrite=False)
        RunFolder(tmp_path / "new").check(resume=resume, overwrite=False)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputExists, match="is no folder"):
        RunFolder(tmp_path / "out").check(resume=False, overwrite=True)


def test_resume_and_overwrite_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="choose one"):
        RunFolder(tmp_path).check(resume=True, overwrite=True)


def test_a_resumed_run_keeps_its_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(CONFIG, overwrite=False)
    folder.start(replace(CONFIG, save_steps=3, device="cpu"), overwrite=False)
    with pytest.raises(InvalidOption, match=r"rank was 8 in .* and is 4 now"):
        folder.start(replace(CONFIG, rank=4), overwrite=False)


def test_an_overwritten_run_leaves_neither_settings_nor_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(CONFIG, overwrite=False)
    _checkpoint(folder, 5)
    folder.start(replace(CONFIG, rank=4), overwrite=True)
    assert folder.last_checkpoint() is None
    assert read_config(folder.config_file)["rank"] == 4


def test_the_last_checkpoint_is_the_newest_that_is_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _checkpoint(folder, 9)
    whole = _checkpoint(folder, 10)
    _checkpoint(folder, 11, state=None)
    _checkpoint(folder, 12, state='{"global_st')
    (folder.checkpoints / "checkpoint-10-copy").mkdir()
    assert folder.last_checkpoint() == whole


def test_an_adapter_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(CONFIG, overwrite=False)
    before = sorted(tmp_path.iterdir())

    def save(path: Path) -> None:
        path.mkdir()
        (path / "rankfold.safetensors").write_text("1")
        (path / "rankfold.json").write_text("{}")

    def interrupted(path: Path) -> None:
        save(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.finish(interrupted, {})
    assert sorted(tmp_path.iterdir()) == before
    folder.finish(save, {"steps": 1})
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in before} == {
        "rankfold.safetensors",
        "rankfold.json",
        "result.json",
    }


def test_tensors_that_find_no_room_at_the_end_are_a_sentence_and_leave_the_folder_as_it_was(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    folder.start(CONFIG, overwrite=False)
    before = sorted(tmp_path.iterdir())

    def full(path: Path) -> None:
        raise SafetensorError("No space left on device")

    with pytest.raises(NotWritten, match=r"No space left on device; --resume writes it"):
        folder.finish(full, {})
    assert sorted(tmp_path.iterdir()) == before
