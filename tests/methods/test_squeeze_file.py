"""Squeezing an adapter that is in a file, apart from any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods._layers import normal
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, OutputExists
from rankfold.formats.changes import Changes, read_changes
from rankfold.methods.squeezing import SqueezeReport


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 9)).double()


def changes() -> Changes:
    pairs = {
        "0": (normal(6, 4), normal(4, 8, seed=2)),
        "2": (5 * normal(9, 5, seed=3), normal(5, 6, seed=4)),
    }
    return Changes(pairs, whole={"norm.weight": torch.ones(3)}, base="somebody/model")


def kept(values: torch.Tensor, rank: int) -> float:
    return float(values[rank:].norm() / values.norm())


def test_every_change_becomes_its_best_approximation_and_the_rest_stays() -> None:
    old, report = changes(), SqueezeReport()
    new = rf.squeeze(old, 2, report=report)
    assert (new.base, dict(new.whole)) == (old.base, dict(old.whole))
    for row, path in zip(report.rows, old.paths, strict=True):
        values = torch.linalg.svdvals(old.dense(path))
        lost = torch.linalg.matrix_norm(new.dense(path) - old.dense(path))
        torch.testing.assert_close(lost, values[2:].norm())
        assert row == {
            "weight": path, "before": old.rank(path), "after": 2, "error": pytest.approx(kept(values, 2)),
        }  # fmt: skip
    assert old.rank("0") == 4


def test_a_rank_that_is_not_smaller_leaves_the_factors_bit_for_bit() -> None:
    old = changes()
    new = rf.squeeze(old, 4)
    assert all(map(torch.equal, new.pairs["0"], old.pairs["0"]))
    assert new.rank("2") == 4


def test_ranks_are_shared_out_by_the_errors_of_outputs_on_data() -> None:
    old, model, x = changes(), base(), normal(40, 8, seed=5) * torch.logspace(1, -2, 8).double()
    report = SqueezeReport()
    new = rf.squeeze(old, 2, share="error", data=[x], base=model, progress=False, report=report)
    inputs = {"0": x, "2": torch.tanh(model[0](x)).detach()}
    for row in report.rows:
        path, change = row["weight"], old.dense(row["weight"])
        values = torch.linalg.svdvals(change @ inputs[path].T)
        lost = torch.linalg.matrix_norm((new.dense(path) - change) @ inputs[path].T)
        torch.testing.assert_close(
            lost, values[row["after"] :].norm(), rtol=1e-4, atol=1e-4 * float(values[0])
        )
    assert sum(new.rank(p) * sum(new.shape(p)) for p in new.paths) <= 2 * (14 + 15)


def test_a_folder_in_another_tools_form_is_read_and_written_anew(tmp_path: Path) -> None:
    model = rf.adapt(base(), "lora", rank=4, targets=["0", "2"])
    for layer in (model[0], model[2]):
        layer.expression.leaf("up").value.data = normal(*layer.expression.leaf("up").shape)
    rf.export(model, tmp_path / "peft", "peft")
    new = rf.squeeze(tmp_path / "peft", 2, out=tmp_path / "small")
    written = read_changes(tmp_path / "small")
    x = normal(5, 8)
    loaded = rf.load(base(), tmp_path / "small")(x)
    torch.testing.assert_close(loaded, rf.squeeze(model, 2)(x), atol=1e-5, rtol=1e-5)
    for path in ("0", "2"):
        torch.testing.assert_close(written.dense(path), new.dense(path))


def test_changes_that_depend_on_the_base_need_it(tmp_path: Path) -> None:
    model = rf.adapt(base(), "dora", rank=4, targets=["0"])
    model[0].expression.leaf("up").value.data = normal(6, 4)
    rf.save(model, tmp_path / "dora")
    with pytest.raises(Incompatible, match="which squeeze takes as base="):
        rf.squeeze(tmp_path / "dora", 2)
    old = model[0].expression.dense().detach() - base()[0].weight.detach()
    new = rf.squeeze(tmp_path / "dora", 2, base=base()).dense("0")
    torch.testing.assert_close(
        torch.linalg.matrix_norm(new - old), torch.linalg.svdvals(old)[2:].norm(), atol=1e-5, rtol=1e-5
    )


def test_a_folder_that_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    plain = Changes(changes().pairs)
    rf.squeeze(plain, 2, out=tmp_path / "out")
    with pytest.raises(OutputExists):
        rf.squeeze(plain, 1, out=tmp_path / "out")
    assert read_changes(tmp_path / "out").rank("0") == 2
    rf.squeeze(plain, 1, out=tmp_path / "out", overwrite=True)
    assert read_changes(tmp_path / "out").rank("0") == 1


def test_what_the_form_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="trained whole"):
        rf.squeeze(changes(), 2, out=tmp_path / "out", format="portable")
    assert not (tmp_path / "out").exists()


def test_names_that_only_the_model_undoes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="0 is a name that only the model undoes; pass it as base="):
        rf.squeeze(replace(changes(), flattened=True), 2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_factor_with_nan_is_named() -> None:
    old = changes()
    old.pairs["2"][0][0, 0] = torch.nan
    with pytest.raises(InvalidOption, match=r"^2: .*NaN"):
        rf.squeeze(old, 1)


def test_data_without_the_model_and_options_of_models_are_refused() -> None:
    with pytest.raises(InvalidOption, match="pass base="):
        rf.squeeze(changes(), 1, data=[normal(3, 8)])
    with pytest.raises(InvalidOption, match="name= belongs to squeezing a model"):
        rf.squeeze(changes(), 1, name="default")  # type: ignore[call-overload]
