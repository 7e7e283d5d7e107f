"""AFM mimics outputs: of linear layers, an activation inside, and of tables by how often rows are met."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compression._calibrated import compressed, inputs, layer, leaf, mean_square, normal, weight
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption, NotDense, UnsupportedLayer


def test_the_linear_form_is_that_of_lord_and_at_full_rank_the_layer_itself() -> None:
    x, plain = inputs(mean=2.0), layer()
    mine = compressed(copy.deepcopy(plain), "afm", data=[x])
    torch.testing.assert_close(mine(x), compressed(copy.deepcopy(plain), "lord", data=[x])(x))
    full = rf.compress(
        layer(4, 40), "afm", keep=0.999, data=[inputs(200, 40)], targets="0", progress=False
    )  # of rank 3, the largest that saves anything
    assert leaf(full, "up").shape == (4, 3)


def test_an_activation_stands_between_the_factors_with_the_bias_before_it(tmp_path: Path) -> None:
    x, plain = inputs(mean=2.0), layer()
    y = plain(x).detach()
    model = compressed(copy.deepcopy(plain), "afm", data=[x], activation="relu")
    frame = leaf(model, "up")
    bias = plain[0].bias.detach()
    inner = (x @ weight(plain).T + bias) @ frame
    outer = y.mean(0) - frame @ (frame.T @ y.mean(0))
    torch.testing.assert_close(model(x).detach(), inner.relu() @ frame.T + outer)
    torch.testing.assert_close(leaf(model, "shift"), frame.T @ bias)
    torch.testing.assert_close(model[0].bias.detach(), outer)
    again = rf.load(copy.deepcopy(plain), rf.save(model, tmp_path / "saved"))
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    with pytest.raises(NotDense, match="relu between its factors"):
        rf.fold(model)
    trained = {leaf.name for leaf in model[0].expression.leaves() if leaf.trainable}
    assert trained == {"up", "down", "shift"}


def test_with_an_activation_nothing_is_calibrated_behind_it() -> None:
    plain = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 10)).double()
    options: dict[str, Any] = {"keep": 0.5, "data": [inputs()], "calibration": "sequential"}
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(NotDense, match="can stand for a weight while others are calibrated"):
        rf.compress(plain, "afm", activation="relu", progress=False, **options)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    with pytest.raises(InvalidOption, match="activation must be one of identity"):
        rf.compress(plain, "afm", activation="tanh", keep=0.5, data=[inputs()], progress=False)


def test_a_layer_without_a_bias_may_get_one_around_the_activation() -> None:
    x, plain = inputs(mean=2.0), layer(bias=False)
    y = plain(x).detach()
    model = compressed(copy.deepcopy(plain), "afm", data=[x], activation="gelu", add_bias=True)
    frame = leaf(model, "up")
    outer = y.mean(0) - frame @ (frame.T @ y.mean(0))
    torch.testing.assert_close(model(x).detach(), torch.nn.functional.gelu(y @ frame) @ frame.T + outer)
    bare = compressed(copy.deepcopy(plain), "afm", data=[x], activation="gelu")
    frame = leaf(bare, "up")
    torch.testing.assert_close(bare(x).detach(), torch.nn.functional.gelu(y @ frame) @ frame.T)


# Tables -----------------------------------------------------------------------------------------------


def table(rows: int = 30, width: int = 8) -> nn.Module:
    model = nn.Sequential(nn.Embedding(rows, width)).double()
    model[0].weight.data = normal(rows, width, seed=4) @ normal(width, width, seed=5) + 1
    return model


def skewed(rows: int = 30, count: int = 400) -> Tensor:
    """Return ids of which few are frequent; the last row is never met."""
    frequency = torch.arange(1, rows).double() ** -1.3
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(frequency, count, replacement=True, generator=generator).reshape(-1, 20)


def best(matrix: Tensor, frequency: Tensor, rank: int) -> Tensor:
    mean = frequency @ matrix
    _, _, right = torch.linalg.svd(frequency.sqrt()[:, None] * (matrix - mean))
    return (matrix - mean) @ right[:rank].T @ right[:rank] + mean


def test_a_table_is_compressed_by_how_often_its_rows_are_met() -> None:
    plain, ids, rank = table(), skewed(), 3
    keep = rank * (30 + 8) / 240 + 1e-9
    model = rf.compress(copy.deepcopy(plain), "afm", keep=keep, targets="0", data=[ids], progress=False)
    frequency = ids.flatten().bincount(minlength=30).double() / ids.numel()
    wanted = best(weight(plain), frequency, rank)
    torch.testing.assert_close(model(torch.arange(30)[None])[0].detach(), wanted)
    torch.testing.assert_close(leaf(model, "offset")[0], frequency @ weight(plain))
    down = leaf(model, "down")
    torch.testing.assert_close(down @ down.T, torch.eye(rank).double())
    even = best(weight(plain), torch.full((30,), 1 / 30).double(), rank)
    y = plain(ids).detach()
    assert mean_square(y, model(ids)) < 0.9 * mean_square(y, even[ids])
    assert (wanted - weight(plain)).norm() > (even - weight(plain)).norm()


def test_a_compressed_table_is_saved_loaded_and_folded(tmp_path: Path) -> None:
    plain, ids = table(), skewed()
    model = rf.compress(copy.deepcopy(plain), "afm", keep=0.5, targets="0", data=[ids], progress=False)
    again = rf.load(copy.deepcopy(plain), rf.save(model, tmp_path / "saved"))
    assert torch.equal(again(ids), model(ids))
    wanted = model(ids).detach()
    folded = rf.fold(model)
    assert type(folded[0]) is nn.Embedding
    torch.testing.assert_close(folded(ids).detach(), wanted)


class Classifier(nn.Module):
    """A table and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(30, 8), nn.Linear(8, 12)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (batch, token, 12)."""
        return self.layer(self.table(ids))


@pytest.mark.parametrize("calibration", ["parallel", "sequential"])
@pytest.mark.parametrize("share", ["uniform", "error", "sensitivity"])
def test_tables_and_layers_are_compressed_together(calibration: str, share: str) -> None:
    model, ids = Classifier().double(), skewed()
    plain = copy.deepcopy(model)
    rf.compress(
        model, "afm", keep=0.8, targets=["table", "layer"], data=[ids], calibration=calibration, share=share,
        progress=False,
    )  # fmt: skip
    assert (model(ids) - plain(ids)).norm() < 0.5 * plain(ids).norm()


def test_other_methods_of_inputs_refuse_tables() -> None:
    with pytest.raises(UnsupportedLayer, match="0 is of the kind embedding; lord applies to plain linear"):
        rf.compress(table(), "lord", targets="0", data=[skewed()], progress=False)
