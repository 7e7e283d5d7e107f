"""Changes that are not of low rank: the best approximation at a rank, and its error for every weight."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from formats.small import adapted, agree, in_peft, sharp
from hypothesis import given
from hypothesis import strategies as st
from layers.models import logits
from safetensors.torch import load_file
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.formats.change import approximated, exact_change, smallest_rank, tail_error, truncated
from rankfold.layers import require

FULL = ("hira", "diablo", "dora", "abba")


def changes(model: nn.Module) -> dict[str, Tensor]:
    """Return the change of every weight as a matrix, in float64."""
    adaptation = require(model)
    return {
        path: (expression.dense().double() - adaptation.layers[path].matrix().double()).detach()
        for path, expression in adaptation.expressions("default").items()
    }


def written(folder: Path) -> dict[str, Tensor]:
    """Return the change that a folder of peft says, by path."""
    model = peft.PeftModel.from_pretrained(sharp("llama"), str(folder))
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    return {name: layer.get_delta_weight("default").double().detach() for name, layer in layers.items()}


def full(method: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapted("llama", method, **({"rank": 6} if method == "abba" else {}))


@pytest.mark.parametrize("format", ["peft", "portable"])
@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_best_approximation_of_a_rank_is_written_with_its_true_error(
    method: str, rank: int, format: str, tmp_path: Path
) -> None:
    model = full(method)
    report = rf.export(model, tmp_path / "out", format, rank=rank)
    found, wanted = written(tmp_path / "out"), changes(model)
    assert [row["weight"] for row in report.rows] == list(wanted)
    for row in report.rows:
        change = wanted[row["weight"]]
        error = float((found[row["weight"]] - change).norm() / change.norm())
        best = float(torch.linalg.svdvals(change)[rank:].norm() / change.norm())
        assert error == pytest.approx(best, abs=2e-5)
        assert row["error"] == pytest.approx(best, abs=2e-5)
        assert row["rank"] == rank
        assert row["exact"] == (row["error"] == 0)
    assert report.largest_error == max(row["error"] for row in report.rows)
    assert report.largest_error > 0.01 or rank == 8
    assert f"{report.largest_error:.3g}" in str(report)


@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("bound", [0.5, 0.1, 1e-3])
def test_the_smallest_rank_within_an_error_is_chosen_for_every_weight(
    method: str, bound: float, tmp_path: Path
) -> None:
    model = full(method)
    report = rf.export(model, tmp_path / "out", max_error=bound)
    found = written(tmp_path / "out")
    for path, change in changes(model).items():
        row = next(row for row in report.rows if row["weight"] == path)
        values = torch.linalg.svdvals(change)
        assert float((found[path] - change).norm() / change.norm()) <= bound * 1.001
        if row["rank"] > 1:
            assert float(values[row["rank"] - 1 :].norm() / values.norm()) > bound * 0.999


@pytest.mark.parametrize("method", ["hira", "diablo", "abba"])
@pytest.mark.parametrize("format", ["peft", "portable"])
def test_without_a_rank_or_an_error_such_a_change_is_refused(
    method: str, format: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidOption, match="not of low rank; pass rank= or max_error="):
        rf.export(full(method), tmp_path / "out", format, native=False)
    assert list(tmp_path.iterdir()) == []


def test_the_magnitude_of_dora_goes_into_the_change_or_is_kept_and_never_dropped(tmp_path: Path) -> None:
    model = adapted("llama", "dora", rank=3)
    with pytest.raises(InvalidOption, match="not of low rank"):
        rf.export(model, tmp_path / "portable", "portable")
    rf.export(model, tmp_path / "kept")
    assert any("magnitude" in key for key in load_file(tmp_path / "kept" / "adapter_model.safetensors"))
    report = rf.export(model, tmp_path / "full", "portable", rank=16)
    assert report.largest_error < 1e-5
    agree(logits(in_peft(tmp_path / "full", sharp("llama")), "llama"), logits(model, "llama"))


def test_an_exact_change_is_cut_only_when_asked(tmp_path: Path) -> None:
    model = adapted("llama", "lora/pissa", rank=4)
    assert rf.export(model, tmp_path / "larger", rank=10).exact
    report = rf.export(model, tmp_path / "cut", rank=2)
    found = written(tmp_path / "cut")
    for path, change in changes(model).items():
        row = next(row for row in report.rows if row["weight"] == path)
        error = float((found[path] - change).norm() / change.norm())
        assert row == {"weight": path, "rank": 2, "exact": False, "error": pytest.approx(error, abs=1e-5)}
    assert {row["rank"] for row in rf.export(model, tmp_path / "within", max_error=0.9).rows} != {8}


def test_a_change_that_is_zero_has_no_error(tmp_path: Path) -> None:
    model = rf.adapt(sharp("llama"), "hira", rank=2)
    for options in ({"rank": 2}, {"max_error": 0.1}):
        report = rf.export(model, tmp_path / str(options), **options)
        assert report.exact
        agree(logits(in_peft(Path(report.path), sharp("llama")), "llama"), logits(sharp("llama"), "llama"))


# The arithmetic ---------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_cutting_a_pair_is_cutting_its_product(
    out: int, inputs: int, inner: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    down = torch.randn(inner, inputs, generator=generator, dtype=torch.float64)
    (first, second), error = truncated((up, down), rank, None)
    (left, right), wanted = approximated(up @ down, rank, None)
    torch.testing.assert_close(first @ second, left @ right)
    assert error == pytest.approx(wanted, abs=1e-9)
    difference = torch.linalg.matrix_norm(up @ down - first @ second) / torch.linalg.matrix_norm(up @ down)
    assert error == pytest.approx(float(difference), abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_the_smallest_rank_is_the_first_within_the_error(values: list[float], bound: float) -> None:
    ordered = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = smallest_rank(ordered, bound)
    assert tail_error(ordered, rank) <= bound
    assert rank == 1 or tail_error(ordered, rank - 1) > bound


EXACT = (
    "lora", "vera", "lora-xs", "svfit", "uni-lora", "flora-tucker", "gralora", "hra", "lora/pissa",
    "lora/olora",
)  # fmt: skip


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_an_exact_pair_is_the_change(method: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).double()
    rf.adapt(model, method, rank=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    expression = require(model).expressions("default")["0"]
    pair = exact_change(expression)
    assert pair is not None
    change = expression.dense() - model[0].weight
    torch.testing.assert_close(pair[0] @ pair[1], change, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("format", ["peft", "portable", "gguf", "dense"])
def test_an_adapter_with_nan_is_not_written(format: str, tmp_path: Path) -> None:
    model = adapted("llama")
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    torch.nn.init.constant_(layer.expression.leaf("up").value, float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(Incompatible, match=r"layers\.1\.self_attn\.q_proj:up holds NaN"):
        rf.export(model, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("method", ["hra", "hira"])
def test_a_change_of_a_weight_with_nan_is_not_written(method: str, rank: int | None, tmp_path: Path) -> None:
    model = full(method)
    layer = next(iter(require(model).layers.values()))
    with torch.no_grad():
        layer.stored()[0, 0] = float("nan")
    with pytest.raises(Incompatible, match="its change holds NaN"):
        rf.export(model, tmp_path / "out", "portable", rank=rank)
    assert not (tmp_path / "out").exists()
