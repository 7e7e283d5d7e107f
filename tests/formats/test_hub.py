"""Hub ids in load and save, with the hub itself replaced; and the model card that the hub reads."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from battery import adapted_blocks, points
from formats.small import contents, output, saved
from hosts import blocks

import rankfold as rf
from rankfold.errors import MissingDependency, MissingPath
from rankfold.formats import native
from rankfold.layers import require


def test_an_id_is_fetched_with_its_revision_and_only_the_files_of_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = saved(tmp_path / "cache"), []

    def snapshot_download(identity: str, **options: Any) -> str:
        calls.append((identity, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    loaded = rf.load(blocks(), "somebody/adapter", revision="v2")
    assert torch.equal(output(loaded), output(rf.load(blocks(), folder)))
    ((identity, options),) = calls
    assert (identity, options["revision"]) == ("somebody/adapter", "v2")
    assert {native.RECORD, native.TENSORS, "adapter_config.json"} <= set(options["allow_patterns"])
    assert not any(
        "*" in pattern or pattern.endswith((".bin", ".py")) for pattern in options["allow_patterns"]
    )


def test_a_local_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "somebody" / "adapter")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked")
    )
    monkeypatch.chdir(tmp_path)
    rf.load(blocks(), "somebody/adapter")


@pytest.mark.parametrize("path", ["no such folder", "a/b/c", "/a/b", "./a", "../a", "somebody"])
def test_what_is_no_id_never_asks_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked")
    )
    with pytest.raises(
        MissingPath, match=f"there is no folder {re.escape(str(Path(path)))}|{re.escape(path)}"
    ):
        rf.load(blocks(), path)


def test_a_repository_that_cannot_be_reached_is_a_missing_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(MissingPath, match="no such hub repository can be reached: no network"):
        rf.load(blocks(), "somebody/adapter")


class Hub:
    """Stands for the hub's client and keeps what is uploaded."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.uploaded: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        self.created.append(repo_id)
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert commit_message
        self.uploaded[repo_id] = contents(Path(folder_path))


@pytest.mark.parametrize(
    ("push", "created", "uploaded"),
    [(True, "adapter", "me/adapter"), ("team/other", "team/other", "team/other")],
)
def test_a_saved_folder_is_uploaded_as_it_is(
    push: bool | str, created: str, uploaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    folder = rf.save(adapted_blocks(points("lora")[0]), tmp_path / "adapter", push_to_hub=push)
    assert hub.created == [created]
    assert hub.uploaded == {uploaded: contents(folder)}


def test_nothing_is_uploaded_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    saved(tmp_path / "adapter")


def test_without_the_hub_library_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match=r"pip install 'rankfold\[hub\]'"):
        rf.save(adapted_blocks(points("lora")[0]), tmp_path / "adapter", push_to_hub=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingDependency, match="hub ids need"):
        rf.load(blocks(), "somebody/adapter")


# The model card ---------------------------------------------------------------------------------------


def front_matter(folder: Path) -> dict[str, Any]:
    _, head, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    data = yaml.safe_load(head)
    assert isinstance(data, dict)
    return data


def test_the_card_names_base_method_paper_and_metric(tmp_path: Path) -> None:
    model = adapted_blocks(points("dora")[0])
    model.config._name_or_path = "somebody/blocks-7b"
    folder = rf.save(model, tmp_path / "adapter", notes={"accuracy": 0.91})
    head, text = front_matter(folder), (folder / "README.md").read_text(encoding="utf-8")
    assert head["base_model"] == "somebody/blocks-7b"
    assert head["library_name"] == "rankfold"
    assert {"rankfold", "dora", "arxiv:2402.09353"} <= set(head["tags"])
    assert "| accuracy | 0.91 |" in text
    assert "DoRA: Weight-Decomposed Low-Rank Adaptation (2024), arXiv 2402.09353" in text
    assert "rf.load(model" in text


def test_an_exported_card_names_the_library_that_reads_it(tmp_path: Path) -> None:
    model = adapted_blocks(points("lora")[0])
    model.config._name_or_path = "gpt2"
    rf.export(model, tmp_path / "peft")
    assert front_matter(tmp_path / "peft")["library_name"] == "peft"
    assert front_matter(tmp_path / "peft")["base_model"] == "gpt2"


@pytest.mark.parametrize("name", ["/models/llama", "", "a: b\n- c", "C:\\models", "a/b/c"])
def test_a_base_that_is_no_hub_name_is_left_out_of_the_front_matter(name: str, tmp_path: Path) -> None:
    model = adapted_blocks(points("lora")[0])
    model.config._name_or_path = name
    folder = rf.save(model, tmp_path / "adapter")
    assert "base_model" not in front_matter(folder)
    assert json.loads((folder / native.RECORD).read_text())["base"]["name"] == name


def test_notes_cannot_break_the_table(tmp_path: Path) -> None:
    folder = rf.save(adapted_blocks(points("lora")[0]), tmp_path / "adapter", notes={"a|b": "c\nd"})
    assert "| a\\|b | c d |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", [m.name for m in rf.methods("structure")])
def test_every_method_has_a_card(method: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", method)
    assert method in front_matter(folder)["tags"]
    record = require(rf.load(points(method)[0].blocks(), folder)).adapter().record
    assert record["recipe"]["structure"][0] == method
