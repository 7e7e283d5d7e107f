"""Saving, loading, merging and checking statistics."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold.errors import BaseMismatch, FormatError, Incompatible, InvalidOption, MissingPath, OutputExists
from rankfold.statistics import NotCollected, Statistics, collect
from rankfold.statistics.storage import tensors_of

WHAT: list[Any] = [
    "input_mean", "input_gram", ("input_gram", {"per_sample": "max"}), "column_norm", "gradient",
    "squared_gradient_rows", "sensitivity", ("input_pca", {"components": 8}),
]  # fmt: skip
Batches = list[dict[str, Tensor]]


@pytest.fixture
def found(net: nn.Module, batches: Batches) -> Statistics:
    return collect(net, batches, WHAT)


def same(first: Statistics, second: Statistics) -> None:
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (str(first), first.base, first.what) == (str(second), second.base, second.what)


def close(first: Statistics, second: Statistics) -> None:
    """Compare what the statistics say; of components, what they span."""
    assert (first.batches, list(first)) == (second.batches, list(second))
    for path, entry in first.items():
        other = second[path]
        assert (entry.tokens, entry.leader, entry.shape) == (other.tokens, other.leader, other.shape)
        for name, options in first.what:
            mine, theirs = entry.get(name, **options), other.get(name, **options)
            if name == "input_pca":
                mine, theirs = (
                    p.components.T @ (p.values[:, None] ** 2 * p.components) for p in (mine, theirs)
                )
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


# What one can ask -------------------------------------------------------------------------------------


def test_statistics_are_a_mapping_from_paths(found: Statistics) -> None:
    assert len(found) == 11
    assert "blocks.0.q" in found
    assert "blocks.0.z" not in found
    assert found.get("blocks.0.z") is None
    with pytest.raises(
        NotCollected, match=r"nothing was collected of 'blocks\.0\.z'; did you mean"
    ) as caught:
        found["blocks.0.z"]
    assert isinstance(caught.value, KeyError)
    entry = found["head"]
    assert "gradient" in entry
    assert "output_gram" not in entry
    with pytest.raises(
        NotCollected, match=r"^head: output_gram was not collected; there is input_mean, input_g"
    ):
        entry.get("output_gram")
    with pytest.raises(NotCollected, match=r"input_pca\(components=3\) was not collected"):
        entry.get("input_pca", components=3)
    with pytest.raises(InvalidOption, match="say which by its options"):
        entry.get("input_gram")
    assert entry.get("input_gram", per_sample="none").shape == (6, 6)
    assert found.what[2] == ("input_gram", {"per_sample": "max"})


def test_the_table_names_weights_shapes_tokens_and_memory(found: Statistics) -> None:
    lines = str(found).splitlines()
    assert "of 11 weights over 3 batches" in lines[0]
    assert lines[1].split() == ["blocks.0.q", "6x6", "39", "tokens"]
    assert lines[2].endswith("input as blocks.0.q")
    assert found.nbytes == sum(t.nbytes for t in tensors_of(found).values())
    assert "head" in repr(found["head"])


# Files ------------------------------------------------------------------------------------------------


def test_a_saved_file_loads_the_same(found: Statistics, tmp_path: Path, net: nn.Module) -> None:
    found.save(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    loaded = Statistics.load(str(tmp_path / "file"))
    same(loaded, found)
    loaded.check(net)
    assert loaded["blocks.0.k"].reducers[0] is loaded["blocks.0.q"].reducers[0]
    assert not any(key.startswith("blocks.0.k:0:") for key in tensors_of(loaded))


def test_tied_paths_survive_a_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    collect(model, [torch.ones(1, 3)], "input_mean").save(tmp_path / "file")
    loaded = Statistics.load(tmp_path / "file")
    assert list(loaded) == ["0"]
    assert loaded["1"] is loaded["0"]


def test_a_cut_file_is_refused_wherever_it_is_cut(found: Statistics, tmp_path: Path) -> None:
    found.save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    for length in [*range(0, len(data), len(data) // 60), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(FormatError):
            Statistics.load(tmp_path / "cut")


def test_a_changed_byte_is_refused_or_changes_nothing(found: Statistics, tmp_path: Path) -> None:
    found.save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    refused = 0
    for place in range(0, len(data), max(1, len(data) // 300)):
        changed = bytearray(data)
        changed[place] ^= 1 + place % 255
        (tmp_path / "changed").write_bytes(bytes(changed))
        try:
            same(Statistics.load(tmp_path / "changed"), found)
        except FormatError:
            refused += 1
    assert refused > 250


def test_files_of_another_kind_are_refused(found: Statistics, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(MissingPath):
        Statistics.load(tmp_path / "none")
    with pytest.raises(MissingPath, match="no folder"):
        found.save(tmp_path / "none" / "file")
    with pytest.raises(OutputExists):
        found.save(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "tensors")
    torch.save({"x": torch.ones(2)}, tmp_path / "pickle")
    for name in ("tensors", "pickle"):
        with pytest.raises(FormatError, match=r"holds no statistics|no safetensors file"):
            Statistics.load(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"format_version": "1"}, "no format version"),
        ({"what": [["nothing", {}]]}, "no statistic is called"),
        ({"what": 3}, "does not describe"),
        ({"order": []}, "does not name"),
        ({"order": ["0", "1"]}, "does not describe"),
        ({"weights": {"0": {"shape": [2, 4], "tokens": 3, "leader": "0", "tied": []}}}, "shape"),
        ({"weights": {"0": {"shape": [2], "tokens": 3, "leader": "0", "tied": []}}}, "does not describe"),
        ({"weights": {"0": {"shape": [2, 3], "tokens": 3, "leader": "5", "tied": []}}}, "does not describe"),
        ({"what": [["gradient", {}]]}, "gradient holds"),
        ({"what": [["input_gram", {"per_sample": "none"}]]}, "input_gram has a sum of shape"),
        ({"progress": 3}, "does not describe"),
        ({"base": {}}, "does not describe"),
        ({"base": {"weights": {"0": {"shape": [2, 3], "sample": ["x"], "rms": 1}}}}, "does not describe"),
        ({"base": {"weights": {"0": {"shape": [3, 3], "sample": [1], "rms": 1}}}}, "weight 0"),
    ],
)
def test_records_that_contradict_their_sums_are_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    from safetensors.torch import save_file

    from rankfold.formats.files import json_text
    from rankfold.formats.native import record_digest
    from rankfold.statistics import storage

    found = collect(nn.Sequential(nn.Linear(3, 2)), [torch.ones(3, 3)], "input_mean")
    tensors = tensors_of(found)
    record = {**storage.record_of(found), "progress": {}, "tensors": storage._hash(tensors), **change}
    record["sha256"] = record_digest(record)
    save_file(tensors, tmp_path / "file", metadata={"rankfold": json_text(record)})
    with pytest.raises(FormatError, match=sentence):
        Statistics.load(tmp_path / "file")


# Other models -----------------------------------------------------------------------------------------


def test_statistics_of_another_model_are_refused(found: Statistics, net: nn.Module, net_of: Any) -> None:
    found.check(net)
    found.check(net_of(torch.bfloat16))
    other = net_of()
    nn.init.normal_(other.blocks[0].q.weight)
    with pytest.raises(BaseMismatch, match=r"of another model: the numbers of blocks\.0\.q are others here"):
        found.check(other)
    wide = net_of()
    wide.head = nn.Linear(6, 4)
    with pytest.raises(BaseMismatch, match="head is 4x6 here, 3x6 there"):
        found.check(wide)
    del wide.head
    with pytest.raises(BaseMismatch, match="it has a weight head"):
        found.check(wide)


# Merging ----------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 100))
def test_merging_is_associative_and_equals_one_pass(first: int, second: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    sizes = [first, second, 3, 2]
    batches = [torch.randn(n, 2, 4, dtype=torch.float64) for n in sizes]
    options: dict[str, Any] = {"loss": lambda m, x: m(x).pow(2).sum()}
    what = [*WHAT[:-1], ("input_pca", {"components": 4})]
    a, b, c = (collect(model, part, what, **options) for part in (batches[:1], batches[1:2], batches[2:]))
    before = tensors_of(a)
    whole = collect(model, batches, what, **options)
    close(Statistics.merge(Statistics.merge(a, b), c), whole)
    close(Statistics.merge(a, Statistics.merge(b, c)), whole)
    close(Statistics.merge(a, b, c), whole)
    assert all(torch.equal(value, before[key]) for key, value in tensors_of(a).items())


def test_merging_one_part_changes_nothing(found: Statistics) -> None:
    same(Statistics.merge(found), found)


def test_weights_that_share_an_input_in_one_part_only_do_not_share_after_merging() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, apart: Tensor | None = None) -> Tensor:
            return self.a(x) + self.b(x if apart is None else apart)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x, y = Sometimes(), torch.randn(2, 3), torch.randn(2, 3)
    parts = [collect(model, [batch], "input_mean") for batch in ((x,), (x, y))]
    for merged in (Statistics.merge(*parts), Statistics.merge(*parts[::-1])):
        assert not merged["b"].shares_input
        torch.testing.assert_close(merged["a"].get("input_mean"), x.mean(0))
        torch.testing.assert_close(merged["b"].get("input_mean"), (x.mean(0) + y.mean(0)) / 2)


def test_what_does_not_belong_together_does_not_merge(
    found: Statistics, net_of: Any, batches: Batches
) -> None:
    with pytest.raises(Incompatible, match="do not add up"):
        Statistics.merge(found, collect(net_of(), batches, "input_mean"))
    with pytest.raises(Incompatible, match="different weights"):
        Statistics.merge(found, collect(net_of(), batches, WHAT, targets="q"))
    other = net_of()
    nn.init.zeros_(other.head.weight)
    with pytest.raises(Incompatible, match="different models"):
        Statistics.merge(found, collect(other, batches, WHAT))


def _collect_a_share(rank: int, port: int, folder: str, net: nn.Module, batches: Batches) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        collect(net, batches[rank::2], WHAT).gather().save(Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()


def test_all_processes_get_the_merged_statistics(net: nn.Module, batches: Batches, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(
        _collect_a_share, args=(port, str(tmp_path), net, batches), nprocs=2, start_method="fork"
    )
    first, second = (Statistics.load(tmp_path / name) for name in "01")
    same(first, second)
    close(first, collect(net, [batches[0], batches[2], batches[1]], WHAT))


def test_without_a_process_group_gathering_changes_nothing(found: Statistics) -> None:
    assert found.gather() is found


def test_a_pass_is_not_continued_with_other_batches(net: nn.Module, batches: Batches, tmp_path: Path) -> None:
    file = tmp_path / "pass.safetensors"
    first = collect(net, batches[:2], ["input_mean"], resume=file)
    same(collect(net, batches[:2], ["input_mean"], resume=file), first)
    with pytest.raises(Incompatible, match="holds a pass over other batches"):
        collect(net, batches[::-1], ["input_mean"], resume=file)
    same(collect(net, batches, ["input_mean"], resume=file), collect(net, batches, ["input_mean"]))
