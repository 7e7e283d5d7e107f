"""Whitening makes the singular values the loss of the outputs; the second stage fits what comes before it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compression._calibrated import compressed, inputs, layer, leaf, mean_square, normal, weight
from torch import Tensor, nn

import rankfold as rf
from rankfold.compression import CompressionReport
from rankfold.compression.objective import Site, Solved
from rankfold.compression.papers import svd_llm
from rankfold.compression.papers.svd_llm import updated
from rankfold.statistics import collect
from rankfold.statistics.watched import watch


def whitened(matrix: Tensor, gram: Tensor) -> Tensor:
    """Return W L for C = L L^T, another root than that of the method."""
    return matrix @ torch.linalg.cholesky(gram)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_squared_error_of_the_outputs_is_the_sum_of_the_squares_that_are_cut(rank: int) -> None:
    x, plain, reports = inputs(), layer(), list[CompressionReport]()
    model = compressed(copy.deepcopy(plain), "svd-llm", rank, data=[x[:90], x[90:]], report=reports.append)
    values = torch.linalg.svdvals(whitened(weight(plain), x.T @ x / len(x)))
    error = mean_square(plain(x), model(x))
    assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-9)
    assert reports[0].rows[0].error == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-9)


def test_at_one_rank_its_outputs_are_nearest_and_those_of_svd_farthest() -> None:
    x, plain = inputs(), layer()
    errors = {
        method: mean_square(plain(x), compressed(copy.deepcopy(plain), method, data=[x])(x))
        for method in ("svd-llm", "asvd", "svd")
    }
    assert errors["svd-llm"] < errors["asvd"] < errors["svd"]
    products = {m: weight(compressed(copy.deepcopy(plain), m, data=[x])) for m in errors}
    plain_errors = {m: (weight(plain) - product).norm() for m, product in products.items()}
    assert plain_errors["svd"] < min(plain_errors["svd-llm"], plain_errors["asvd"])


def test_a_dead_channel_and_few_tokens_break_nothing() -> None:
    x, plain = inputs(), layer()
    x[:, 3] = 0
    model = compressed(copy.deepcopy(plain), "svd-llm", data=[x])
    assert weight(model).isfinite().all()
    few = compressed(copy.deepcopy(plain), "svd-llm", data=[x[:3]], few_tokens="allow")
    torch.testing.assert_close(few(x[:3]), plain(x[:3]))  # three tokens span less than rank 3
    with pytest.raises(rf.errors.InvalidOption, match=r"^0: .*have 3 tokens, and its 12 inputs want at"):
        compressed(copy.deepcopy(plain), "svd-llm", data=[x[:3]])


def test_damping_leads_from_the_outputs_to_the_plain_error() -> None:
    x, plain = inputs(), layer()
    large = weight(compressed(copy.deepcopy(plain), "svd-llm", data=[x], damping=1e9))
    svd = weight(compressed(copy.deepcopy(plain), "svd"))
    torch.testing.assert_close(large, svd, rtol=1e-6, atol=1e-6)
    none = weight(compressed(copy.deepcopy(plain), "svd-llm", data=[x]))
    assert (none - svd).norm() > 0.1 * svd.norm()


# The second stage -------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10, bias=False)).double()
    model[0].weight.data, model[2].weight.data = normal(12, 12, seed=6), normal(10, 12, seed=7)
    model[0].bias.data = normal(12, seed=8)
    return model


def site_of(model: nn.Module, x: Tensor, path: str = "0") -> Site:
    found = collect(model, [x], "input_gram")[path]
    (watched,) = watch(model, [path])
    return Site(path, watched.layer, found)


def test_the_second_stage_changes_nothing_where_the_inputs_are_those_of_the_first() -> None:
    x, plain = inputs(), layer()
    model = compressed(copy.deepcopy(plain), "svd-llm", data=[x])
    first = Solved({"up": leaf(model, "up"), "down": leaf(model, "down")}, None, 0, 0, torch.ones(1))
    second = updated(site_of(plain, x), first)
    torch.testing.assert_close(second.leaves["up"], first.leaves["up"], rtol=1e-9, atol=1e-9)
    other = updated(site_of(plain, inputs().flip(1)), first)
    assert (other.leaves["up"] - first.leaves["up"]).norm() > 0.1
    twice = compressed(copy.deepcopy(plain), "svd-llm", data=[x], update=True)  # nothing is before it
    torch.testing.assert_close(weight(twice), weight(model), rtol=1e-9, atol=1e-9)


def test_the_second_stage_is_least_squares_on_what_the_compressed_layers_before_give() -> None:
    x, plain = inputs(), two_layers()
    first = rf.compress(copy.deepcopy(plain), "svd-llm", keep=0.4, data=[x], progress=False)
    second = rf.compress(copy.deepcopy(plain), "svd-llm", keep=0.4, data=[x], update=True, progress=False)
    hidden = second[:2](x).detach()
    down = first[2].expression.leaf("down").tensor().detach()
    wanted = torch.linalg.lstsq(hidden @ down.T, plain[2](hidden)).solution.T
    torch.testing.assert_close(
        second[2].expression.leaf("up").tensor().detach(),
        wanted,
        rtol=1e-7,
        atol=1e-7,
    )
    assert torch.equal(second[2].expression.leaf("down").tensor(), down)
    torch.testing.assert_close(second[0].expression.dense(), first[0].expression.dense())


def test_the_second_stage_goes_on_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    options: dict[str, Any] = {"keep": 0.4, "data": [x], "update": True, "progress": False}
    whole = rf.compress(two_layers(), "svd-llm", **options)
    calls: list[str] = []

    def interrupted(site: Site, found: Solved) -> Solved:
        calls.append(site.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return updated(site, found)

    monkeypatch.setattr(svd_llm, "updated", interrupted)
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        rf.compress(model, "svd-llm", folder=tmp_path, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rf.compress(model, "svd-llm", folder=tmp_path, **options)
    assert calls == ["0", "2", "2"]
    assert torch.equal(model(x), whole(x))
