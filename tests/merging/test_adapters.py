"""Merging adapters: exactly by their factors where a rule is linear, weight by weight otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import Writer
from safetensors.torch import save_file
from torch import Tensor, nn

import rankfold as rf
from rankfold import catalogue
from rankfold.errors import Incompatible, InvalidOption, InvalidRank, MissingPath, NotAdapted
from rankfold.formats.changes import Changes, read_changes
from rankfold.merging import MergeReport
from rankfold.merging.papers.ties import ties
from rankfold.merging.parts import Parts


def changes(rank: int, seed: int, paths: tuple[str, ...] = ("a", "b"), **about: Any) -> Changes:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (6, 8), "b": (10, 7), "c": (4, 4)}
    pairs = {
        path: (
            torch.randn(shapes[path][0], rank, generator=draw, dtype=torch.float64),
            torch.randn(rank, shapes[path][1], generator=draw, dtype=torch.float64),
        )
        for path in paths
    }
    return Changes(pairs, **about)


def merge(*args: Any, **options: Any) -> tuple[Changes, MergeReport]:
    reports: list[MergeReport] = []
    merged = rf.merge(*args, progress=False, report=reports.append, **options)
    return merged, reports[0]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))


def adapted(model: nn.Module, name: str, seed: int, method: str = "lora", rank: int = 2) -> nn.Module:
    """Add an adapter that changes the model."""
    rf.adapt(model, method, rank=rank, name=name, targets="all-linear", seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(0.3 * torch.randn(value.shape, generator=draw))
    return model


# linear rules


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3)])
def test_a_linear_rule_puts_factors_side_by_side_and_is_exact(ranks: tuple[int, int]) -> None:
    one, two = changes(ranks[0], 1), changes(ranks[1], 2)
    merged, report = merge([one, two], "task-arithmetic", weights=[0.3, -0.7], scale=2.0)
    for path in ("a", "b"):
        assert merged.rank(path) == sum(ranks)
        expected = 0.6 * one.dense(path) - 1.4 * two.dense(path)
        torch.testing.assert_close(merged.dense(path), expected, rtol=1e-12, atol=1e-12)
    assert [row["exact"] for row in report.rows] == [True, True]
    assert report.largest_error == 0


def test_the_average_of_adapters_has_the_weights_of_the_average_of_models() -> None:
    one, two = changes(2, 1), changes(2, 2)
    merged, _ = merge([one, two], "linear", weights=[1.0, 3.0])
    torch.testing.assert_close(merged.dense("a"), 0.25 * one.dense("a") + 0.75 * two.dense("a"))


def test_a_smaller_rank_is_the_best_approximation_and_its_error_is_told() -> None:
    one, two = changes(2, 1), changes(2, 2)
    merged, report = merge([one, two], "task-arithmetic", rank=3)
    for path, row in zip(("a", "b"), report.rows, strict=True):
        target = one.dense(path) + two.dense(path)
        values = torch.linalg.svdvals(target)
        assert merged.rank(path) == row["rank"] == 3
        assert row["error"] == pytest.approx(float(values[3:].norm() / values.norm()))
        assert float((merged.dense(path) - target).norm() / target.norm()) == pytest.approx(row["error"])
        up, down = merged.pairs[path]
        torch.testing.assert_close(up.T @ up, down @ down.T)


def test_ranks_that_sum_to_more_than_a_weight_can_have_stay_exact() -> None:
    several = [changes(3, seed) for seed in range(4)]
    merged, report = merge(several, "task-arithmetic")
    assert [merged.rank(path) for path in ("a", "b")] == [6, 7]
    torch.testing.assert_close(merged.dense("a"), sum(one.dense("a") for one in several))
    assert all(row["exact"] for row in report.rows)


# other rules


def test_another_rule_merges_dense_changes_and_tells_the_error_of_its_factors() -> None:
    one, two = changes(1, 1), changes(2, 2)
    merged, report = merge([one, two], "ties", density=0.5)
    for path, row in zip(("a", "b"), report.rows, strict=True):
        models = one.dense(path), two.dense(path)
        target = ties(Parts(path, models, (1.0, 1.0), torch.zeros_like(models[0])), density=0.5)
        assert merged.rank(path) == 3  # the sum of the ranks
        error = float((merged.dense(path) - target).norm() / target.norm())
        best = torch.linalg.svdvals(target)
        assert row["error"] == pytest.approx(error)
        assert error == pytest.approx(float(best[3:].norm() / best.norm()))
        assert not row["exact"]


def test_another_rule_is_exact_at_the_full_rank() -> None:
    one, two = changes(1, 1, ("a",)), changes(2, 2, ("a",))
    merged, report = merge([one, two], "ties", density=0.5, rank=6)
    models = one.dense("a"), two.dense("a")
    target = ties(Parts("a", models, (1.0, 1.0), torch.zeros_like(models[0])), density=0.5)
    torch.testing.assert_close(merged.dense("a"), target)
    assert report.rows[0]["exact"]


def test_a_rule_over_all_tensors_merges_adapters_too() -> None:
    one = changes(2, 1)
    merged, _ = merge([one], "opcm")  # of one model that model
    torch.testing.assert_close(merged.dense("b"), one.dense("b"))


def test_ties_of_one_adapter_of_which_all_is_kept_is_that_adapter() -> None:
    one = changes(2, 1)
    merged, report = merge([one], "ties", density=1.0)
    torch.testing.assert_close(merged.dense("a"), one.dense("a"))
    assert report.rows[0]["error"] == pytest.approx(0, abs=1e-12)


# what does not match


def test_a_weight_that_an_adapter_lacks_is_a_change_of_zero_and_said_so() -> None:
    one, two = changes(2, 1, ("a", "b")), changes(1, 2, ("a", "c"))
    merged, report = merge([one, two], "linear")
    assert [merged.rank(path) for path in ("a", "b", "c")] == [3, 2, 1]
    torch.testing.assert_close(merged.dense("b"), one.dense("b") / 2)
    assert report.notes == [
        "adapter 1 does not change c, which counts as a change of zero",
        "adapter 2 does not change b, which counts as a change of zero",
    ]
    elected, _ = merge([one, two], "ties", density=1.0)
    torch.testing.assert_close(elected.dense("b"), one.dense("b"))
    with pytest.raises(Incompatible, match=r"adapter 1 does not change c, .* leave strict away"):
        merge([one, two], "linear", strict=True)


def test_adapters_of_other_bases_are_told_or_refused() -> None:
    one, two = changes(1, 1, base="llama"), changes(1, 2, base="opt")
    merged, report = merge([one, two], "linear")
    assert report.notes == ["adapter 1 was made for llama and adapter 2 for opt"]
    assert merged.base == "llama"
    with pytest.raises(Incompatible, match="was made for llama and adapter 2 for opt"):
        merge([one, two], "linear", strict=True)


def test_another_shape_or_kind_of_a_weight_is_refused() -> None:
    one = Changes({"a": (torch.ones(3, 1), torch.ones(1, 4))})
    two = Changes({"a": (torch.ones(5, 1), torch.ones(1, 4))})
    embedding = Changes(one.pairs, {"a": "embedding"})
    with pytest.raises(Incompatible, match="a is 3x4 linear in adapter 1 and 5x4 linear in adapter 2"):
        merge([one, two], "linear")
    with pytest.raises(Incompatible, match="3x4 linear in adapter 1 and 3x4 embedding in adapter 2"):
        merge([one, embedding], "linear")


def test_convolutions_keep_their_kind_and_window() -> None:
    kernel = (torch.ones(3, 1), torch.ones(1, 8))
    one = Changes({"a": kernel}, {"a": "convolution"}, {"a": (2, 2)})
    merged, _ = merge([one, one], "linear")
    assert (merged.kinds, merged.windows) == ({"a": "convolution"}, {"a": (2, 2)})


def test_ranks_and_weights_that_cannot_be_are_refused() -> None:
    one = changes(2, 1)
    with pytest.raises(InvalidRank, match="rank 9 is more than any of the weights can have, which is 7"):
        merge([one, one], "linear", rank=9)
    with pytest.raises(InvalidRank, match="at least 1, not 0"):
        merge([one, one], "linear", rank=0)
    with pytest.raises(InvalidOption, match="1 weights were given for 2 models"):
        merge([one, one], "linear", weights=[1.0])
    with pytest.raises(Incompatible, match="change no weight"):
        merge([Changes({})], "linear")
    with pytest.raises(Incompatible, match=r"is an adapter and .* a model"):
        merge([one, network()], "linear")


def test_the_result_has_the_type_that_is_asked_for_or_the_firsts() -> None:
    pair = (torch.ones(3, 1).bfloat16(), torch.ones(1, 4).bfloat16())
    half, single = Changes({"a": pair}), Changes({"a": (torch.ones(3, 1), torch.ones(1, 4))})
    merged, report = merge([half, single], "linear")
    assert {t.dtype for t in merged.pairs["a"]} == {torch.bfloat16}
    assert (report.dtype, report.inputs) == ("bfloat16", "bfloat16+float32")
    merged, _ = merge([half, single], "linear", dtype="float32")
    torch.testing.assert_close(merged.dense("a"), torch.ones(3, 4))


# modules trained whole


def whole(value: float) -> Changes:
    return Changes(changes(1, 1, ("a",)).pairs, whole={"weight": torch.full((2, 2), value)})


def test_a_module_trained_whole_is_merged_over_the_base() -> None:
    base = nn.Linear(2, 2, bias=False)
    nn.init.constant_(base.weight, 1.0)
    merged, _ = merge([whole(3.0), whole(7.0)], "task-arithmetic", base=base, weights=[0.5, 0.25])
    torch.testing.assert_close(merged.whole["weight"], torch.full((2, 2), 1 + 0.5 * 2 + 0.25 * 6))
    lacking = changes(1, 2, ("a",))
    merged, _ = merge([whole(3.0), lacking], "task-arithmetic", base=base)
    torch.testing.assert_close(merged.whole["weight"], torch.full((2, 2), 3.0))


def test_a_module_trained_whole_needs_a_base_unless_all_have_the_same() -> None:
    merged, _ = merge([whole(3.0), whole(3.0)], "ties")
    torch.testing.assert_close(merged.whole["weight"], torch.full((2, 2), 3.0))
    with pytest.raises(Incompatible, match="weight was trained whole and differs between the adapters"):
        merge([whole(3.0), whole(7.0)], "ties")


# folders and models


def test_folders_of_adapters_merge_into_one_that_loads(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        rf.save(adapted(network(), "default", seed, rank=1 + seed), tmp_path / name)
    rf.export(rf.load(network(), tmp_path / "two"), tmp_path / "peft", format="peft")
    _, report = merge([tmp_path / "one", tmp_path / "peft"], "task-arithmetic", out=tmp_path / "out")
    one, two = read_changes(tmp_path / "one"), read_changes(tmp_path / "two")
    loaded = read_changes(tmp_path / "out")
    for path in ("0", "2"):
        torch.testing.assert_close(loaded.dense(path), one.dense(path) + two.dense(path))
        assert loaded.rank(path) == 3
    assert report.path == str(tmp_path / "out")
    assert report.models == [str(tmp_path / "one"), str(tmp_path / "peft")]


def test_adapters_of_one_model_merge_by_their_names() -> None:
    model = adapted(network(), "one", 1)
    first = [layer.expression.dense() for layer in (model[0], model[2])]  # type: ignore[index]
    adapted(model, "two", 2)
    rf.use(model, "two")
    second = [layer.expression.dense() for layer in (model[0], model[2])]  # type: ignore[index]
    merged, report = merge(model, "task-arithmetic", adapters=["two", "one"], weights=[0.5, 2.0])
    for path, w1, w2 in zip(("0", "2"), first, second, strict=True):
        base: Tensor = dict(network().named_parameters())[f"{path}.weight"]
        torch.testing.assert_close(merged.dense(path), 0.5 * (w2 - base) + 2.0 * (w1 - base))
    assert report.models == ["two", "one"]
    everything, _ = merge(model, "linear")
    assert everything.rank("0") == 4
    with pytest.raises(NotAdapted):
        merge(model, "linear", adapters=["three"])
    with pytest.raises(InvalidOption, match="pass that model alone"):
        merge([model], "linear", adapters=["one"])
    with pytest.raises(InvalidOption, match="names no adapter"):
        merge(model, "linear", adapters=[])


def test_methods_that_differ_merge_with_the_model_to_read_them(tmp_path: Path) -> None:
    base = network()
    rf.save(adapted(network(), "default", 1), tmp_path / "lora")
    rf.save(adapted(network(), "default", 2, "dora"), tmp_path / "dora")
    changed = rf.load(network(), tmp_path / "dora")
    merged, _ = merge([tmp_path / "lora", tmp_path / "dora"], "task-arithmetic", base=base)
    lora = read_changes(tmp_path / "lora")
    weight = base[0].weight  # type: ignore[index]
    dora = changed[0].expression.dense() - weight  # type: ignore[index]
    torch.testing.assert_close(merged.dense("0"), (lora.dense("0") + dora), atol=1e-5, rtol=1e-4)


def test_every_linear_rule_says_its_coefficients_on_unit_vectors() -> None:
    linear = [method.name for method in catalogue.methods("merge") if method.traits["linear"]]
    assert {"linear", "task-arithmetic"} <= set(linear)
    one, two = changes(2, 1), changes(2, 2)
    for name in linear:
        merged, _ = merge([one, two], name, weights=[0.3, 0.9])
        dense = (one.dense("a"), two.dense("a"))
        target = catalogue.get("merge", name).build(Parts("a", dense, (0.3, 0.9), torch.zeros_like(dense[0])))
        torch.testing.assert_close(merged.dense("a"), target)


def test_an_adapter_beside_what_is_not_there_is_told_so(tmp_path: Path) -> None:
    model = adapted_folder(tmp_path)
    with pytest.raises(MissingPath, match=r"there is no model folder .*missing"):
        merge([model, tmp_path / "missing"], "linear")
    with pytest.raises(MissingPath, match=r"there is no model folder .*missing"):
        merge([model, model], "linear", base=tmp_path / "missing")


def test_a_file_beside_a_folder_of_a_model_is_told_so(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2, 2)}, file)
    with pytest.raises(Incompatible, match=r"model.safetensors is a file, which can be an adapter only"):
        merge([file, tmp_path], "linear")


def adapted_folder(tmp_path: Path) -> Path:
    return rf.save(rf.adapt(nn.Sequential(nn.Linear(4, 3)), "lora", rank=2), tmp_path / "adapter")


def test_weights_stay_with_their_adapters_where_one_lacks_a_weight() -> None:
    one, two = changes(2, 1, ("a",)), changes(1, 2, ("b",))
    merged, _ = merge([one, two], "task-arithmetic", weights=[0.7, -0.3])
    torch.testing.assert_close(merged.dense("a"), 0.7 * one.dense("a"))
    torch.testing.assert_close(merged.dense("b"), -0.3 * two.dense("b"))


def test_flattened_names_are_undone_by_a_folder_of_the_base(tmp_path: Path) -> None:
    base = Writer(tmp_path).llama("base")
    path = "model.layers.0.self_attn.q_proj"
    up, down = torch.ones(16, 1), torch.ones(1, 16)
    file = tmp_path / "flat.safetensors"
    name = f"lora_te_{path.replace('.', '_')}"
    leaves = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0)}
    save_file({f"{name}.{key}": value for key, value in leaves.items()}, file)
    assert read_changes(file).flattened
    merged, _ = merge([file, file], "task-arithmetic", base=base)
    assert merged.paths == (path,)
    torch.testing.assert_close(merged.dense(path), torch.full((16, 16), 2.0))
