"""Approximations weighed by the inputs of every weight, against their definition and peft's converter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from formats.small import adapted, in_peft, sharp
from hypothesis import given
from hypothesis import strategies as st
from layers.models import VOCABULARY
from safetensors.torch import load_file
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.formats import export as write
from rankfold.formats import peft as form
from rankfold.formats.approximate import Goal, fitted
from rankfold.layers import require
from rankfold.linalg import RootGram
from rankfold.methods.export import input_grams


def batches(seed: int, count: int = 4) -> list[dict[str, Tensor]]:
    """Return ids of which a few are frequent, as words are."""
    generator = torch.Generator().manual_seed(seed)
    skewed = torch.rand(count, 8, 12, generator=generator) ** 3 * (VOCABULARY - 3)
    return [{"input_ids": ids.long() + 3} for ids in skewed]


def changes(model: nn.Module) -> dict[str, Tensor]:
    adaptation = require(model)
    expressions = adaptation.expressions("default")
    return {p: (e.dense().double() - adaptation.layers[p].matrix()).detach() for p, e in expressions.items()}


def written(folder: Path) -> dict[str, Tensor]:
    """Return the change of every weight in a folder of LoRA whose alpha is its rank."""
    tensors = {
        k.removeprefix("base_model.model."): v.double() for k, v in load_file(folder / form.TENSORS).items()
    }
    paths = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {path: tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"] for path in paths}


def output_error(rest: Tensor, change: Tensor, gram: Tensor) -> float:
    """Return the relative error of outputs on inputs of a Gram matrix."""
    parts = [(matrix @ gram.double() @ matrix.T).trace() for matrix in (rest, change)]
    return float((parts[0] / parts[1]).clamp_min(0).sqrt())


@pytest.mark.parametrize("method", ["hira", "dora", "lokr", "gralora"])
@pytest.mark.parametrize("format", ["peft", "portable"])
def test_both_errors_of_every_weight_are_those_of_what_is_written(
    method: str, format: str, tmp_path: Path
) -> None:
    model, data = adapted("llama", method, rank=4), batches(0)
    report = rf.export(model, tmp_path / "out", format, rank=2, data=data, progress=False)
    grams, found = input_grams(model, data, progress=False), written(tmp_path / "out")
    for path, change in changes(model).items():
        row = next(row for row in report.rows if row["weight"] == path)
        rest = change - found[path]
        assert row["error"] == pytest.approx(float(rest.norm() / change.norm()), abs=1e-5)
        assert row["output_error"] == pytest.approx(output_error(rest, change, grams[path]), abs=1e-5)
        assert row["rank"] == 2
    assert report.largest_output_error == max(row["output_error"] for row in report.rows)
    assert f"of outputs {report.rows[0]['output_error']:.3g}" in str(report)


def test_data_lower_the_error_of_outputs_and_raise_that_of_weights(tmp_path: Path) -> None:
    model, data = adapted("llama", "hira", rank=4), batches(0)
    rf.export(model, tmp_path / "plain", rank=2)
    report = rf.export(model, tmp_path / "data", rank=2, data=data, progress=False)
    grams, plain = input_grams(model, data, progress=False), written(tmp_path / "plain")
    for row in report.rows:
        path, change = row["weight"], changes(model)[row["weight"]]
        assert row["output_error"] < output_error(change - plain[path], change, grams[path])
        assert row["error"] > float((change - plain[path]).norm() / change.norm())


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.02])
def test_the_smallest_rank_within_an_error_of_outputs_is_chosen(bound: float, tmp_path: Path) -> None:
    model, data = adapted("llama", "hira", rank=4), batches(0)
    report = rf.export(model, tmp_path / "out", max_error=bound, data=data, progress=False)
    for row in report.rows:
        assert row["output_error"] <= bound
        if row["rank"] > 1:
            smaller = rf.export(
                model, tmp_path / "less", rank=row["rank"] - 1, data=data, progress=False, overwrite=True
            )
            errors = {other["weight"]: other["output_error"] for other in smaller.rows}
            assert errors[row["weight"]] > bound
            break


@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 4), st.integers(1, 7), st.integers(0, 99))
def test_a_product_is_fitted_as_its_matrix(out: int, inputs: int, rank: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, 3, generator=generator, dtype=torch.float64)
    down = torch.randn(3, inputs, generator=generator, dtype=torch.float64)
    seen = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    metric, goal = RootGram(seen.T @ seen), Goal(rank=rank)
    (first, second), errors = fitted((up, down), goal, metric)
    (left, right), wanted = fitted(up @ down, goal, metric)
    torch.testing.assert_close(seen @ (first @ second).T, seen @ (left @ right).T, rtol=1e-6, atol=1e-6)
    assert errors["output_error"] == pytest.approx(wanted["output_error"], abs=1e-6)
    distance = (seen @ (up @ down - first @ second).T).norm() / (seen @ (up @ down).T).norm()
    assert errors["output_error"] == pytest.approx(float(distance), abs=1e-6)


def test_an_exact_change_is_written_exactly_beside_approximated_ones(tmp_path: Path) -> None:
    model = adapted("llama", rank=2)
    report = rf.export(model, tmp_path / "out", rank=4, data=batches(0), progress=False)
    assert report.exact
    assert {row["output_error"] for row in report.rows} == {0.0}


def test_statistics_that_were_collected_before_give_the_same_file(tmp_path: Path) -> None:
    model, data = adapted("llama", "hira", rank=4), batches(0)
    found = rf.collect(model, data, "input_gram", targets="all-linear", progress=False)
    rf.export(model, tmp_path / "batches", rank=2, data=data, progress=False)
    rf.export(model, tmp_path / "statistics", rank=2, data=found)
    one, other = written(tmp_path / "batches"), written(tmp_path / "statistics")
    assert all(torch.equal(one[path], other[path]) for path in one)
    part = rf.collect(model, data, "input_gram", targets=["q_proj"], progress=False)
    with pytest.raises(InvalidOption, match="do not cover"):
        rf.export(model, tmp_path / "part", rank=2, data=part)


def test_embeddings_are_approximated_in_the_frobenius_norm(tmp_path: Path) -> None:
    model = adapted("llama", "hira", rank=4, targets=["embed_tokens", "q_proj"])
    report = rf.export(model, tmp_path / "out", rank=2, data=batches(0), progress=False)
    errors = {row["weight"]: row["output_error"] for row in report.rows}
    assert errors.pop("model.embed_tokens") is None
    assert all(0 < error < 1 for error in errors.values())
    in_peft(tmp_path / "out", sharp("llama"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({}, "none is asked for"), ({"format": "dense"}, "dense form is exact"), ({"rank": 0}, "at least 1")],
)
def test_data_that_would_weigh_nothing_are_refused(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        rf.export(adapted("llama", rank=2), tmp_path / "out", data=batches(0), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_without_a_gram_matrix_keeps_the_plain_metric(tmp_path: Path) -> None:
    model = adapted("llama", "hira", rank=4)
    path = "model.layers.0.self_attn.q_proj"
    grams = {path: input_grams(model, batches(0), progress=False)[path]}
    report = write(model, tmp_path / "out", rank=2, grams=grams)
    assert [row["weight"] for row in report.rows if row["output_error"] is not None] == [path]


# Against peft -----------------------------------------------------------------------------------------

PEERS: list[tuple[str, dict[str, Any]]] = [
    ("loha", {"rank": 4}),
    ("lokr", {"rank": 8}),
    ("vera", {"rank": 8}),
    ("gralora", {"rank": 8, "k": 4}),
    ("dora", {"rank": 4}),
]


def by_peft(folder: Path, rank: int) -> dict[str, Tensor]:
    """Return the changes that peft's converter makes of an adapter that it has loaded."""
    model = peft.PeftModel.from_pretrained(sharp("llama"), str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, tensors = peft.convert_to_lora(model, rank)
    plain = {key.removeprefix("base_model.model."): value.double() for key, value in tensors.items()}
    paths = [key.removesuffix(".lora_A.weight") for key in plain if key.endswith(".lora_A.weight")]
    return {path: plain[f"{path}.lora_B.weight"] @ plain[f"{path}.lora_A.weight"] for path in paths}


@pytest.mark.parametrize(("method", "options"), PEERS, ids=str)
def test_on_other_inputs_no_weight_is_further_off_than_by_the_converter_of_peft(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted("llama", method, **options)
    rf.export(model, tmp_path / "native")
    rf.export(model, tmp_path / "ours", rank=3, data=batches(0, 16), progress=False)
    ours, theirs = written(tmp_path / "ours"), by_peft(tmp_path / "native", 3)
    held_out = input_grams(model, batches(1, 16), progress=False)
    assert set(ours) == set(theirs)
    for path, change in changes(model).items():
        errors = [output_error(change - found[path], change, held_out[path]) for found in (ours, theirs)]
        assert errors[0] <= errors[1] + 1e-6, path
