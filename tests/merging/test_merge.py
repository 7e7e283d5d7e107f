"""Merging modules and folders of models: what comes out, what is said of it, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import Writer
from safetensors.torch import load_file
from torch import Tensor, nn

import rankfold as rf
from rankfold import catalogue
from rankfold.errors import FormatError, Incompatible, InvalidOption, OutputExists, UnknownMethod
from rankfold.merging import MergeReport
from rankfold.merging.models import Shape
from rankfold.merging.norms import PIECE
from rankfold.merging.registry import merger
from rankfold.merging.sources import Sources
from rankfold.merging.writer import ShardWriter


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def merge(*args: Any, **options: Any) -> Any:
    return rf.merge(*args, progress=False, **options)


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture
def temporary_rule() -> Iterator[Any]:
    """Yield `merger`, and take what it registers out of the catalogue again."""
    catalogue.load_all()
    before = dict(catalogue._METHODS)
    yield merger
    catalogue._METHODS.clear()
    catalogue._METHODS.update(before)


# modules


def test_modules_become_a_new_module_and_stay_as_they_were() -> None:
    base, *models = (network(seed) for seed in range(3))
    before = [copy.deepcopy(m.state_dict()) for m in (base, *models)]
    merged = merge(models, "task-arithmetic", base=base, weights=[0.3, 0.7])
    for name, value in merged.state_dict().items():
        b, one, two = (state[name] for state in before)
        expected = b + 0.3 * (one - b) + 0.7 * (two - b) if value.is_floating_point() else b
        torch.testing.assert_close(value, expected)
    assert merged is not base
    for model, state in zip((base, *models), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_one_random_choice_gives_one_merge() -> None:
    base, *models = (network(seed) for seed in range(3))
    first, again, other = (
        merge(models, "dare-linear", base=base, seed=seed, density=0.5)[0].weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_merged_module_trains() -> None:
    merged = merge([network(0), network(1)], "linear")
    merged(torch.randn(5, 4)).sum().backward()
    assert merged[0].weight.grad is not None


def test_modules_merge_in_the_type_that_is_asked_for_or_the_bases() -> None:
    base, one = network(0).bfloat16(), network(1)
    reports: list[MergeReport] = []
    merged = merge([one], "task-arithmetic", base=base, report=reports.append)
    assert merged[0].weight.dtype == torch.bfloat16
    assert (reports[0].dtype, reports[0].inputs) == ("bfloat16", "bfloat16+float32")
    assert merge([one], "linear", dtype=torch.float64)[0].weight.dtype == torch.float64


def test_a_rule_over_all_tensors_gets_the_same_models() -> None:
    base, *models = (network(seed) for seed in range(3))
    merged = merge(models[:1], "opcm", base=base)
    torch.testing.assert_close(merged[0].weight, models[0][0].weight)  # type: ignore[index]


# folders


def test_folders_become_a_folder_that_transformers_loads(write: Writer, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    base, one, two = (write.llama(name, seed) for seed, name in enumerate(("base", "one", "two")))
    (base / "tokenizer.json").write_text("{}")
    (base / "generation_config.json").write_text('{"top_k": 3}')
    (base / "trainer_state.json").write_text("{}")
    out = merge([one, two], "ties", base=base, out=tmp_path / "out", density=0.5)
    assert out == tmp_path / "out"
    names = {file.name for file in out.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "README.md", "merge.json",
        "model.safetensors",
    }  # fmt: skip
    loaded, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    live = merge(
        [LlamaForCausalLM.from_pretrained(one), LlamaForCausalLM.from_pretrained(two)],
        "ties", base=LlamaForCausalLM.from_pretrained(base), density=0.5,
    )  # fmt: skip
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(loaded(tokens).logits, live(tokens).logits)


def test_shards_have_the_size_that_is_asked_for_and_hold_the_same_tensors(
    write: Writer, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    one, two = (write.llama(name, seed) for seed, name in enumerate(("one", "two")))
    whole = merge([one, two], "linear", out=tmp_path / "whole")
    parts = merge([one, two], "linear", out=tmp_path / "parts", shard_bytes=3000)
    shards = sorted(parts.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 3000 for shard in shards)
    expected, merged = read(whole), read(parts)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert LlamaForCausalLM.from_pretrained(parts).dtype == torch.float32


def test_the_type_of_a_folder_is_the_bases_or_asked_for_and_said_in_its_config(
    write: Writer, tmp_path: Path
) -> None:
    half = write.llama("half", 0, torch.bfloat16)
    single = write.llama("single", 1)
    reports: list[MergeReport] = []
    kept = merge([single, half], "linear", base=half, out=tmp_path / "kept", report=reports.append)
    assert {t.dtype for t in read(kept).values()} == {torch.bfloat16}
    assert reports[0].dtype == "bfloat16"
    asked = merge([single, half], "linear", out=tmp_path / "asked", dtype="float16")
    assert {t.dtype for t in read(asked).values()} == {torch.float16}
    assert json.loads((asked / "config.json").read_text())["dtype"] == "float16"


def test_mixed_types_are_averaged_before_they_are_rounded(write: Writer, tmp_path: Path) -> None:
    one, two = torch.randn(50), torch.randn(50)
    paths = [write("one", {"w": one.bfloat16()}), write("two", {"w": two})]
    merged = read(merge(paths, "linear", out=tmp_path / "out"))["w"]
    assert torch.equal(merged, ((one.bfloat16().float() + two) / 2).bfloat16())


def test_the_report_says_what_was_merged_how_and_how_far_each_tensor_moved(
    write: Writer, tmp_path: Path
) -> None:
    base = write("base", {"w": torch.full((4,), 2.0), "n": torch.arange(2)})
    one = write("one", {"w": torch.full((4,), 3.0), "n": torch.arange(2) + 1})
    reports: list[MergeReport] = []
    out = merge([one], "task-arithmetic", base=base, out=tmp_path / "out", scale=0.5, report=reports.append)
    report = reports[0]
    assert report.rows == [{"tensor": "w", "change": 0.25}]
    assert report.taken == ["n"]
    assert (report.method, report.options, report.weights) == ("task-arithmetic", {"scale": 0.5}, [1.0])
    assert (report.models, report.base, report.path) == ([str(one)], str(base), str(out))
    assert report.bytes == 4 * 4 + 2 * 8
    assert report.seconds > 0
    assert "w: changed by 0.25 of its norm" in str(report)
    assert json.loads((out / "merge.json").read_text())["rows"] == report.rows
    card = (out / "README.md").read_text()
    assert "| one | 1 |" in card
    assert "2212.04089" in card
    assert torch.equal(read(out)["n"], torch.arange(2))


def test_what_is_infinite_in_all_models_alike_stays(write: Writer, tmp_path: Path) -> None:
    mask = torch.tensor([0.0, float("-inf")])
    one, two = (
        write("one", {"mask": mask}),
        write(
            "two",
            {
                "mask": mask,
            },
        ),
    )
    assert torch.equal(read(merge([one], "ties", base=two, out=tmp_path / "out"))["mask"], mask)
    other = write("other", {"mask": mask.flip(0)})
    with pytest.raises(Incompatible, match=r"ties gives (NaN|infinities) in mask: a model holds infinities"):
        merge([other], "ties", base=two, out=tmp_path / "none", density=1.0)


def test_the_change_of_a_tensor_is_told_where_its_squares_cannot_be_added(
    write: Writer, tmp_path: Path
) -> None:
    one, two = write("one", {"a": torch.full((3,), 1e30)}), write("two", {"a": torch.full((3,), 3e30)})
    reports: list[MergeReport] = []
    merge([one, two], "linear", out=tmp_path / "out", report=reports.append)
    assert reports[0].rows[0]["change"] == pytest.approx(1.0)


def test_a_merge_into_one_of_its_own_models_is_complete(write: Writer) -> None:
    one, two = write("one", {"w": torch.ones(3)}), write("two", {"w": torch.zeros(3)})
    out = merge([one, two], "linear", out=one, overwrite=True)
    assert torch.equal(read(out)["w"], torch.full((3,), 0.5))


# refusals


def test_a_merge_that_fails_leaves_nothing_and_replaces_nothing(write: Writer, tmp_path: Path) -> None:
    one = write("one", {"a": torch.ones(2), "b": torch.ones(2)})
    two = write("two", {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
    out = tmp_path / "out"
    with pytest.raises(Incompatible, match="two: b holds NaN in 1 of 2 entries"):
        merge([one, two], "linear", out=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    before = merge([one, one], "linear", out=out)
    with pytest.raises(Incompatible, match="holds NaN"):
        merge([one, two], "linear", out=out, overwrite=True)
    assert torch.equal(read(before)["b"], torch.ones(2))


def test_a_folder_that_is_there_is_refused_before_anything_is_read(write: Writer, tmp_path: Path) -> None:
    one = write("one", {"a": torch.ones(2)})
    with pytest.raises(OutputExists):
        merge([tmp_path / "none"], "linear", out=one)


def test_what_makes_no_sense_together_is_one_sentence(write: Writer, tmp_path: Path) -> None:
    path, out = write("one", {"a": torch.ones(2)}), tmp_path / "out"
    cases: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
        (UnknownMethod, "did you mean", "tie", {}),
        (InvalidOption, "ties has no option 'desnity'", "ties", {"desnity": 1.0}),
        (Incompatible, r"ties merges what was added to a base: pass base= \(--base\)", "ties", {}),
        (InvalidOption, r"merged into a folder; pass out= \(--out\)", "linear", {"out": None}),
        (InvalidOption, "dtype must be one of", "linear", {"dtype": "int8"}),
        (InvalidOption, "rank= and strict= are of merged adapters", "linear", {"rank": 3}),
        (InvalidOption, "room for bytes", "linear", {"shard_bytes": 0}),
        (InvalidOption, "3 weights were given for 1 models", "linear", {"weights": [1, 2, 3]}),
    ]
    for error, sentence, method, options in cases:
        with pytest.raises(error, match=sentence):
            merge([path], method, **{"out": out, **options})
        assert not out.exists()
    with pytest.raises(InvalidOption, match="slerp merges 2 models, not 3"):
        merge([path] * 3, "slerp", out=out)
    with pytest.raises(InvalidOption, match="modules are merged into a module"):
        merge([network(0)], "linear", out=out)
    with pytest.raises(Incompatible, match="there is no model to merge"):
        merge([], "linear", out=out)
    with pytest.raises(Incompatible, match="model 1 is a int; merge modules or folders"):
        merge([3], "linear", out=out)


def test_values_too_large_for_half_precision_are_refused_and_not_made_infinite(
    write: Writer, tmp_path: Path
) -> None:
    path = write("one", {"a": torch.tensor([1e6])})
    with pytest.raises(InvalidOption, match=r"a has values up to 1e\+06, which float16 cannot hold"):
        merge([path], "linear", out=tmp_path / "out", dtype="float16")


def test_a_rule_must_give_every_tensor_once_in_its_shape(
    write: Writer, tmp_path: Path, temporary_rule: Any
) -> None:
    path = write("one", {"a": torch.ones(2), "b": torch.ones(2)})

    def rule(pairs: list[tuple[str, Tensor]], method: str) -> None:
        @temporary_rule(method, title="", year=2000, formula="", whole=True, base="unused")
        def build(sources: Sources) -> Iterator[tuple[str, Tensor]]:
            yield from pairs

    rule([("a", torch.ones(2))], "forgets")
    rule([("a", torch.ones(2)), ("a", torch.ones(2))], "repeats")
    rule([("a", torch.ones(3))], "reshapes")
    for method, sentence in [
        ("forgets", "gave no b"),
        ("repeats", "gave a, which is no tensor of the models, or twice"),
        ("reshapes", r"gave a as \(3,\), not \(2,\)"),
    ]:
        with pytest.raises(Incompatible, match=sentence):
            merge([path], method, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_rule_may_give_tensors_in_any_order_and_shards_stay_readable(tmp_path: Path) -> None:
    kinds = [torch.bfloat16, torch.float64, torch.float32, torch.int8, torch.bool]
    tensors = {f"t{n}": (torch.randn(n + 1, 3) > 0).to(kind) for n, kind in enumerate(kinds)}
    tensors["scalar"], tensors["none"] = torch.tensor(3.5), torch.zeros(0, 2)
    tensors["turned"] = torch.randn(3, 4).T
    shapes = {name: Shape(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with ShardWriter(tmp_path, shapes, largest=60) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    merged = read(tmp_path)
    assert merged.keys() == tensors.keys()
    assert all(torch.equal(merged[name], tensors[name]) for name in tensors)
    assert all(merged[name].dtype == tensors[name].dtype for name in tensors)


def test_a_truncated_shard_is_named_and_nothing_is_written(write: Writer, tmp_path: Path) -> None:
    one = write("one", {"a": torch.ones(20), "b": torch.ones(20)}, shards=2)
    shard = next(one.glob("*2-of*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(FormatError, match=r"model-00002-of-00002.safetensors is truncated"):
        merge([one], "linear", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_takes_what_was_announced_and_nothing_else(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": Shape((2,), torch.float32), "b": Shape((2,), torch.float32)})
    with pytest.raises(Incompatible, match="c is not a tensor of the models, or came twice"):
        writer.write("c", torch.ones(2))
    with pytest.raises(Incompatible, match=r"a came as \(2,\) torch.float64"):
        writer.write("a", torch.ones(2, dtype=torch.float64))
    writer.write("a", torch.ones(2))
    with pytest.raises(Incompatible, match=r"the method gave no b \(1 are missing\)"):
        writer.__exit__(None, None, None)


def test_a_sum_of_large_tensors_is_written_in_pieces_and_is_the_sum(write: Writer, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 2 * PIECE + 3
    models = [{"w": torch.randn(size, generator=generator)} for _ in range(2)]
    folders = [write(name, tensors) for name, tensors in zip("ab", models, strict=True)]
    reports: list[MergeReport] = []
    merge(folders, "linear", weights=[1, 3], out=tmp_path / "out", report=reports.append)
    expected = (models[0]["w"] + 3 * models[1]["w"]) / 4
    torch.testing.assert_close(read(tmp_path / "out")["w"], expected)
    moved = (expected - models[0]["w"]).norm() / models[0]["w"].norm()
    assert reports[0].rows == [{"tensor": "w", "change": pytest.approx(float(moved), rel=1e-5)}]
    assert reports[0].bytes == 4 * size


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_in_the_last_piece_of_a_sum_is_found(
    write: Writer, tmp_path: Path, value: float
) -> None:
    one, other = torch.ones(PIECE + 2), torch.ones(PIECE + 2)
    other[-1] = value
    folders = [write(name, {"w": tensor}) for name, tensor in zip("ab", (one, other), strict=True)]
    sentence = "b: w holds NaN in 1 of" if value != value else "linear gives infinities in w"
    with pytest.raises(Incompatible, match=sentence):
        merge(folders, "linear", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_infinite_in_all_models_stays_in_a_sum_of_pieces(write: Writer, tmp_path: Path) -> None:
    mask = torch.ones(PIECE + 2)
    mask[-1] = -torch.inf
    folders = [write(name, {"mask": mask, "w": torch.ones(2) * n}) for n, name in enumerate("ab")]
    merge(folders, "linear", out=tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["mask"], mask)
    assert torch.equal(read(tmp_path / "out")["w"], torch.full((2,), 0.5))


def test_a_tensor_of_which_a_part_came_is_missing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"w": Shape((4,), torch.float32)})
    with pytest.raises(Incompatible, match="gave no w"), writer:
        assert not writer.write_flat("w", [torch.ones(3)])


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_weights_that_the_numbers_cannot_hold_are_one_sentence(method: str) -> None:
    with pytest.raises(InvalidOption, match=rf"{method}: the weights .1e.60, 1.0.*larger"):
        merge([network(1), network(2)], method, base=network(0), weights=[1e60, 1])


def test_integers_keep_their_type_where_another_is_asked_for(write: Writer, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "ids": torch.arange(4)}
    folders = [write("one", tensors), write("two", tensors)]
    merge(folders, "linear", dtype="bfloat16", out=tmp_path / "out")
    assert [read(tmp_path / "out")[name].dtype for name in tensors] == [torch.bfloat16, torch.int64]


def test_every_tensor_of_a_shard_starts_at_a_multiple_of_its_entries(tmp_path: Path) -> None:
    shapes = {"a": Shape((1,), torch.bfloat16), "b": Shape((3,), torch.float32)}
    with ShardWriter(tmp_path, shapes) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.ones(shape.shape, dtype=shape.dtype))
    for name, place in writer.places.items():
        assert place.start % shapes[name].dtype.itemsize == 0
