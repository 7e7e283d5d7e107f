"""Low-rank changes apart from a model: what they are, how they are cut, and what they are written as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankfold as rf
from rankfold import Changes
from rankfold.errors import Incompatible, InvalidOption, OutputExists
from rankfold.formats import portable


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Net(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.body = nn.ModuleDict({"linear": nn.Linear(6, 5)})
        self.head = nn.Linear(5, 2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.conv(self.embed(ids).mT).mT
        return self.head(torch.tanh(self.body["linear"](hidden)))  # type: ignore[no-any-return]


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


IDS = torch.tensor([[0, 3, 6, 2], [1, 1, 5, 4]])


def changes_of_all_kinds() -> Changes:
    pairs = {
        "embed": (normal(7, 2), normal(2, 4, seed=1)),
        "conv": (normal(6, 3, seed=2), normal(3, 12, seed=3)),
        "body.linear": (normal(5, 1, seed=4), normal(1, 6, seed=5)),
    }
    kinds = {"embed": "embedding", "conv": "convolution"}
    whole = {"head.weight": normal(2, 5, seed=6), "head.bias": normal(2, seed=7)}
    return Changes(pairs, kinds, {"conv": (3,)}, whole, "some/base", "a test")


def changed(changes: Changes) -> Net:
    """Return the model with the changes added to its weights."""
    model = net()
    with torch.no_grad():
        for path in changes.paths:
            weight = model.get_submodule(path).weight
            weight += changes.dense(path).reshape(weight.shape)
        for key, value in changes.whole.items():
            model.get_parameter(key).copy_(value)
    return model


# What it is -------------------------------------------------------------------------------------------


def test_changes_tell_rank_shape_norm_and_matrix() -> None:
    changes = changes_of_all_kinds()
    assert changes.paths == ("embed", "conv", "body.linear")
    assert [changes.rank(path) for path in changes.paths] == [2, 3, 1]
    assert changes.shape("conv") == (6, 12)
    assert changes.kinds == {"embed": "embedding", "conv": "convolution", "body.linear": "linear"}
    for path in changes.paths:
        up, down = changes.pairs[path]
        assert torch.equal(changes.dense(path), up @ down)
        assert changes.norm(path) == pytest.approx(float((up @ down).norm()), rel=1e-6)


def test_plain_data_and_the_table_name_every_weight() -> None:
    changes = changes_of_all_kinds()
    data = changes.to_dict()
    assert [row["weight"] for row in data["rows"]] == ["embed", "conv", "body.linear"]
    row = data["rows"][1]
    assert (row["kind"], row["shape"], row["window"], row["rank"]) == ("convolution", [6, 12], [3], 3)
    assert (data["source"], data["base"], data["whole"]) == (
        "a test",
        "some/base",
        ["head.bias", "head.weight"],
    )
    head, titles, *rows, tail = str(changes).splitlines()
    assert head == "3 weights, rank 1-3, from a test"
    assert titles.split() == ["weight", "kind", "shape", "rank", "norm"]
    assert rows[1].split()[:4] == ["conv", "convolution", "6x12", "3"]
    assert tail.split() == ["whole:", "head.bias,", "head.weight"]
    assert str(Changes({})) == "0 weights"


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("which do not multiply", ({"a": (normal(3, 2), normal(3, 4))},)),
        ("which do not multiply", ({"a": (normal(3), normal(3, 4))},)),
        ("b has a kind or a window and no factors", ({"a": (normal(3, 1), normal(1, 4))}, {"b": "linear"})),
        ("a is linear and has the window", ({"a": (normal(3, 1), normal(1, 4))}, {}, {"a": (2,)})),
        ("a is convolution and has the window", ({"a": (normal(3, 1), normal(1, 4))}, {"a": "convolution"})),
        ("does not divide", ({"a": (normal(3, 1), normal(1, 4))}, {"a": "convolution"}, {"a": (3,)})),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(sentence: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        Changes(*arguments)  # type: ignore[arg-type]


# Cutting ----------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    out=st.integers(1, 6),
    columns=st.integers(1, 6),
    inner=st.integers(1, 8),
    rank=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_a_squeezed_change_is_the_best_of_its_rank_and_balanced(
    out: int, columns: int, inner: int, rank: int, seed: int
) -> None:
    up = normal(out, inner, seed=seed, dtype=torch.float64)
    down = normal(inner, columns, seed=seed + 1, dtype=torch.float64)
    squeezed = Changes({"a": (up, down)}).squeezed(rank)
    values = torch.linalg.svdvals(up @ down)
    assert squeezed.rank("a") == min(rank, out, columns, inner)
    error = float((squeezed.dense("a") - up @ down).norm())
    assert error == pytest.approx(float(values[rank:].norm()), abs=1e-10)
    left, right = squeezed.pairs["a"]
    torch.testing.assert_close(left.T @ left, right @ right.T)


@settings(max_examples=40)
@given(energy=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_the_rank_by_energy_is_the_smallest_that_keeps_it(energy: float, seed: int) -> None:
    up, down = (normal(6, 5, seed=seed + i, dtype=torch.float64) for i in (0, 1))
    changes = Changes({"a": (up, down.T)})
    squares = torch.linalg.svdvals(up @ down.T).square()
    kept = squares.cumsum(0) / squares.sum()
    rank = changes.squeezed(energy=energy).rank("a")
    assert kept[rank - 1] >= energy - 1e-12
    assert rank == 1 or kept[rank - 2] < energy


def test_all_the_energy_needs_only_the_rank_that_there_is() -> None:
    up, down = normal(8, 2, dtype=torch.float64), normal(2, 9, seed=1, dtype=torch.float64)
    doubled = Changes({"a": (torch.cat([up, up], 1), torch.cat([down, down], 0))})
    squeezed = doubled.squeezed(energy=1.0)
    assert squeezed.rank("a") == 2
    torch.testing.assert_close(squeezed.dense("a"), 2 * up @ down)


def test_every_weight_may_be_cut_to_its_own_rank_and_keeps_all_else() -> None:
    changes = changes_of_all_kinds()
    squeezed = changes.squeezed({"embed": 1, "conv": 2, "body.linear": 4})
    assert [squeezed.rank(path) for path in squeezed.paths] == [1, 2, 1]
    for name in ("kinds", "windows", "whole", "base", "source"):
        assert getattr(squeezed, name) == getattr(changes, name)


def test_wide_factors_are_cut_without_their_product() -> None:
    up, down = normal(3000, 4), normal(4, 3000, seed=1)

    class Seen(torch.overrides.TorchFunctionMode):
        largest = 0

        def __torch_function__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
            result = function(*arguments, **(named or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                Seen.largest = max(Seen.largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return result

    with Seen():
        assert Changes({"a": (up, down)}).squeezed(2).rank("a") == 2
    assert 0 < Seen.largest <= 3000 * 4


@pytest.mark.parametrize(
    ("sentence", "target"),
    [
        ("pass either rank= or energy=", {}),
        ("pass either rank= or energy=", {"rank": 1, "energy": 0.5}),
        ("rank must be at least 1, not 0", {"rank": 0}),
        ("rank has no entry for conv", {"rank": {"embed": 1, "body.linear": 1}}),
        ("energy must lie in", {"energy": 0.0}),
        ("energy must lie in", {"energy": float("nan")}),
    ],
)
def test_impossible_cuts_are_refused(sentence: str, target: dict[str, object]) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        changes_of_all_kinds().squeezed(**target)  # type: ignore[arg-type]


def test_a_weight_that_holds_nan_is_named() -> None:
    changes = Changes({"good": (normal(3, 1), normal(1, 3)), "bad": (normal(3, 1) / 0, normal(1, 3))})
    with pytest.raises(InvalidOption, match=r"^bad: the up factor"):
        changes.squeezed(rank=1)


# Writing ----------------------------------------------------------------------------------------------


def test_the_peft_folder_is_read_back_and_loaded_as_the_same_change(tmp_path: Path) -> None:
    changes = changes_of_all_kinds()
    folder = changes.save(tmp_path / "out")
    back = rf.read_changes(folder)
    assert (back.kinds, back.windows, back.base) == (changes.kinds, changes.windows, "some/base")
    assert {path: back.rank(path) for path in back.paths} == {
        path: changes.rank(path) for path in changes.paths
    }
    for path in changes.paths:
        torch.testing.assert_close(back.dense(path), changes.dense(path))
    assert all(torch.equal(back.whole[key], value) for key, value in changes.whole.items())
    model = rf.load(net(), folder)
    torch.testing.assert_close(model(IDS), changed(changes)(IDS))


def test_peft_reads_the_folder_as_the_same_change(tmp_path: Path) -> None:
    import peft

    changes = changes_of_all_kinds()
    folder = changes.save(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(net(), folder).eval()
    torch.testing.assert_close(model(IDS), changed(changes)(IDS))


def test_the_portable_folder_is_what_every_server_reads(tmp_path: Path) -> None:
    changes = Changes({"a.q": (normal(5, 2), normal(2, 6)), "a.v": (normal(4, 3), normal(3, 6))})
    folder = changes.save(tmp_path / "out", "portable")
    assert portable.check(folder) == []
    back = rf.read_changes(folder)
    assert [back.rank(path) for path in back.paths] == [3, 3]
    for path in changes.paths:
        torch.testing.assert_close(back.dense(path), changes.dense(path))


@pytest.mark.parametrize(
    ("sentence", "format", "change"),
    [
        ("embed: servers read LoRA of linear layers only", "portable", {}),
        ("cannot hold head.bias", "portable", {"kinds": {}, "windows": {}}),
        ("a flattened name, which only its model can undo", "peft", {"flattened": True}),
        (
            "no agreed names for the attention projection",
            "peft",
            {"kinds": {"embed": "attention projection"}},
        ),
        ("there is no change to write", "peft", {"pairs": {}, "kinds": {}, "windows": {}}),
    ],
)
def test_what_a_form_cannot_say_is_refused_and_nothing_is_written(
    sentence: str, format: str, change: dict[str, object], tmp_path: Path
) -> None:
    changes = replace(changes_of_all_kinds(), **{"windows": {}, "kinds": {"embed": "embedding"}} | change)
    with pytest.raises(Incompatible, match=sentence):
        changes.save(tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_only_overwritten_when_asked(tmp_path: Path) -> None:
    changes = changes_of_all_kinds()
    changes.save(tmp_path / "out")
    with pytest.raises(OutputExists):
        changes.save(tmp_path / "out")
    changes.squeezed(1).save(tmp_path / "out", overwrite=True)
    assert rf.read_changes(tmp_path / "out").rank("conv") == 1
    with pytest.raises(InvalidOption, match="format must be one of peft, portable"):
        changes.save(tmp_path / "other", "dense")
