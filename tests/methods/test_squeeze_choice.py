"""Which rank a squeeze keeps: by energy, by error, by a budget, and by what inputs make of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods._layers import adapted, change, disturbed, leaves_of, linear, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import BaseMismatch, InvalidOption, UnsupportedLayer
from rankfold.linalg import squeeze_factors
from rankfold.methods.squeezing import Choice, SqueezeReport, terms_of

PATHS = ("0", "2", "3")


def planted(values: list[float], out: int = 6, columns: int = 8, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Return factors of a product with these singular values."""
    left, right = (torch.linalg.qr(normal(size, len(values), seed=seed + size)).Q for size in (out, columns))
    return left * torch.tensor(values).double(), right.T


def stack(seed: int = 0) -> nn.Module:
    """Return three adapted layers of unlike shapes, of which the second changes most."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 7), nn.Linear(7, 9)).double()
    rf.adapt(model, "lora", rank=5, targets=list(PATHS), alpha=5)
    disturbed(model)
    leaves_of(model, "2")["up"].data *= 6
    return model


def ranks_of(model: nn.Module) -> list[int]:
    return [leaves_of(model, path)["up"].shape[1] for path in PATHS]


def numbers(ranks: list[int], model: nn.Module) -> int:
    return sum(r * sum(model.get_submodule(p).weight.shape) for r, p in zip(ranks, PATHS, strict=True))


def inputs(count: int = 40, columns: int = 10, seed: int = 5) -> Tensor:
    """Return inputs that lie along some directions far more than along others."""
    return normal(count, columns, seed=seed) * torch.logspace(1, -2, columns, dtype=torch.float64)


@pytest.mark.parametrize(("energy", "rank"), [(0.1, 1), (0.63, 1), (0.65, 2), (0.9, 3), (0.999, 5), (1.0, 5)])
def test_energy_keeps_the_smallest_rank_with_that_share_of_the_squares(energy: float, rank: int) -> None:
    up, down = planted([5, 3, 2, 1, 0.5])
    terms = terms_of(up, down)
    assert Choice(energy=energy).ranks([terms.spectrum], [(6, 8)]) == [rank]


def test_all_the_energy_of_a_change_of_rank_two_is_in_two_terms() -> None:
    model = adapted("lora", rank=4)
    leaves = leaves_of(model)
    leaves["up"].data = normal(6, 2) @ normal(2, 4, seed=2)
    before = change(model)
    assert leaves_of(rf.squeeze(model, energy=1.0))["up"].shape[1] == 2
    torch.testing.assert_close(change(model), before)


@pytest.mark.parametrize("max_error", [0.05, 0.3, 0.8])
def test_the_largest_error_is_obeyed_and_one_rank_less_would_not_do(max_error: float) -> None:
    model, report = disturbed(adapted("lora", rank=5)), SqueezeReport()
    before = change(model)
    rf.squeeze(model, max_error=max_error, report=report)
    values = torch.linalg.svdvals(before)
    rank = leaves_of(model)["up"].shape[1]
    error = torch.linalg.vector_norm(change(model) - before) / torch.linalg.vector_norm(before)
    assert error <= max_error
    assert values[rank - 1 :].norm() / values.norm() > max_error
    assert report.rows == [
        {"weight": "0", "before": 5, "after": rank, "error": pytest.approx(float(error), abs=1e-12)}
    ]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.lists(st.floats(0, 9), min_size=3, max_size=3), st.integers(0, 99))
def test_a_shared_rank_costs_no_more_and_leaves_no_larger_error_than_the_same_rank_everywhere(
    rank: int, sizes: list[float], seed: int
) -> None:
    shapes = [(6, 8), (5, 5), (9, 4)]
    spectra = [
        torch.linalg.svdvals(normal(*shape, seed=seed + i)) * size
        for i, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
    ]
    ranks = Choice(rank=rank, share="error").ranks(spectra, shapes)
    assert all(1 <= r <= len(s) for r, s in zip(ranks, spectra, strict=True))
    uniform = [min(rank, len(s)) for s in spectra]
    spent, allowed = (
        sum(r * sum(shape) for r, shape in zip(each, shapes, strict=True)) for each in (ranks, uniform)
    )
    left, bound = (
        sum(float(s[r:].square().sum()) for r, s in zip(each, spectra, strict=True))
        for each in (ranks, uniform)
    )
    assert spent <= allowed
    assert left <= bound * (1 + 1e-12)


def test_where_what_remains_of_a_budget_fits_nothing_the_same_rank_everywhere_can_be_better() -> None:
    spectra = [torch.tensor([20, 10.0]).sqrt(), torch.tensor([20, 9.5, 9.4]).sqrt()]
    assert Choice(rank=2, share="error").ranks(spectra, [(5, 5), (4, 5)]) == [2, 2]  # and not 1 and 3


def test_a_shared_rank_leaves_the_smallest_error_that_its_numbers_allow() -> None:
    uniform, shared = stack(), stack()
    before = [change(shared, path) for path in PATHS]
    rf.squeeze(uniform, 2)
    rf.squeeze(shared, 2, share="error")
    assert ranks_of(uniform) == [2, 2, 2]
    assert ranks_of(shared)[1] > 2
    assert numbers(ranks_of(shared), shared) <= numbers([2, 2, 2], shared)
    errors = [
        sum(float((change(m, p) - b).square().sum()) for p, b in zip(PATHS, before, strict=True))
        for m in (shared, uniform)
    ]
    assert errors[0] < errors[1]


def test_the_scale_before_a_product_counts_in_a_budget() -> None:
    """The first weight has the larger factors and, as alpha is over its own rank, the smaller change."""
    recipe = rf.Recipe("lora", ranks=("table", {"ranks": {"0": 8, "1": 2}}))
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)).double()
    rf.adapt(model, recipe, rank=8, alpha=8, targets=["0", "1"])
    for path, size in (("0", 1.5), ("1", 1.0)):
        leaves = leaves_of(model, path)
        rank = leaves["up"].shape[1]
        leaves["up"].data = size * torch.linalg.qr(normal(9, rank)).Q
        leaves["down"].data = torch.linalg.qr(normal(9, rank, seed=2)).Q.T.contiguous()
    changes = [torch.linalg.svdvals(change(model, path))[0] for path in ("0", "1")]
    assert changes[0] < changes[1]
    report = SqueezeReport()
    rf.squeeze(model, 2, share="error", report=report)
    assert [row["after"] for row in report.rows] == [2, 2]  # by the factors alone it would be 3 and 1


def test_with_data_the_error_of_the_outputs_is_the_smallest_of_that_rank() -> None:
    x = inputs(columns=8)
    plain, weighted = (disturbed(adapted("lora", rank=4)) for _ in range(2))
    before, report = change(weighted), SqueezeReport()
    rf.squeeze(plain, 2)
    rf.squeeze(weighted, 2, data=[x], report=report, progress=False)
    errors = [float(torch.linalg.vector_norm(x @ (change(m) - before).T)) for m in (weighted, plain)]
    tail = torch.linalg.svdvals(before @ x.T)[2:].norm()
    assert errors[0] == pytest.approx(float(tail), rel=1e-5)  # the Gram matrix is kept in float32
    assert errors[0] < 0.9 * errors[1]
    relative = errors[0] / float(torch.linalg.vector_norm(x @ before.T))
    assert report.weighted
    assert report.rows[0]["error"] == pytest.approx(relative, rel=1e-4)


def test_on_held_out_inputs_of_the_same_kind_the_outputs_are_no_worse_either() -> None:
    plain, weighted = stack(), stack()
    reference = stack()
    rf.squeeze(plain, 2)
    rf.squeeze(weighted, 2, data=[inputs(200)], progress=False)
    held = inputs(100, seed=11)
    hidden = held
    for path, layer in zip(PATHS, (0, 2, 3), strict=True):
        full = change(reference, path)
        lost = [
            float(torch.linalg.vector_norm(hidden @ (change(m, path) - full).T)) for m in (weighted, plain)
        ]
        assert lost[0] <= lost[1] * (1 + 1e-6)
        hidden = reference[: layer + 1](held).detach()
        hidden = torch.tanh(hidden) if layer == 0 else hidden


def test_statistics_that_were_collected_before_give_the_same() -> None:
    first, second = stack(), stack()
    rf.squeeze(first, 2, data=[inputs()], progress=False)
    found = rf.collect(second, [inputs()], "input_gram", targets=list(PATHS), progress=False)
    rf.squeeze(second, 2, data=found)
    for path in PATHS:
        assert torch.equal(change(first, path), change(second, path))


def test_statistics_of_another_model_are_refused() -> None:
    found = rf.collect(stack(1), [inputs()], "input_gram", targets=list(PATHS), progress=False)
    with pytest.raises(BaseMismatch, match="another model"):
        rf.squeeze(stack(), 2, data=found)


def test_inputs_in_one_direction_need_one_term_and_others_keep_the_largest_of_the_change() -> None:
    up, down = normal(6, 4), normal(4, 8, seed=2)
    gram = torch.zeros(8, 8, dtype=torch.float64)
    gram[0, 0] = 1
    terms = terms_of(up, down, gram)
    assert terms.error(1) < 1e-6
    cut = terms.at(3)
    torch.testing.assert_close((cut.up @ cut.down)[:, 0], (up @ down)[:, 0])
    torch.testing.assert_close(terms.at(4).up @ terms.at(4).down, up @ down)
    rest = up @ down - (cut.up @ cut.down)
    assert torch.linalg.vector_norm(rest) < torch.linalg.vector_norm(up @ down)


@pytest.mark.parametrize("gram", [None, "inputs"])
@pytest.mark.parametrize("rank", [1, 3])
def test_terms_are_balanced_and_come_from_the_old_factors_by_the_maps(gram: Any, rank: int) -> None:
    up, down = normal(9, 5), normal(5, 8, seed=2)
    x = inputs(columns=8)
    cut = terms_of(up, down, None if gram is None else x.T @ x).at(rank)
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(up @ cut.up_map, cut.up, **close)
    torch.testing.assert_close(cut.down_map @ down, cut.down, **close)
    torch.testing.assert_close(cut.up.T @ cut.up, cut.down @ cut.down.T, **close)


@pytest.mark.parametrize("weigh", [False, True])
def test_a_term_without_an_input_side_has_no_part_in_the_new_terms(weigh: bool) -> None:
    up, down = normal(3, 5), normal(5, 8, seed=2)  # columns of up depend on one another
    down[1] = 0
    x = inputs(columns=8)
    cut = terms_of(up, down, x.T @ x if weigh else None).at(2)
    torch.testing.assert_close(up @ cut.up_map, cut.up, atol=1e-12, rtol=1e-12)
    assert cut.up_map[1].abs().max() < 1e-12


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 50), st.booleans())
def test_the_result_is_the_same_for_every_way_to_write_the_product(rank: int, seed: int, weigh: bool) -> None:
    up, down, mix = normal(7, 5, seed=seed), normal(5, 8, seed=seed + 1), normal(5, 5, seed=seed + 2)
    mix = mix + 4 * torch.eye(5, dtype=torch.float64)
    x = inputs(columns=8, seed=seed)
    gram = x.T @ x if weigh else None
    first = terms_of(up, down, gram).at(rank)
    second = terms_of(up @ mix, torch.linalg.solve(mix, down), gram).at(rank)
    torch.testing.assert_close(first.up @ first.down, second.up @ second.down, atol=1e-6, rtol=1e-6)


def test_alphas_of_source_and_target_do_not_change_the_product() -> None:
    up, down = normal(7, 5), normal(5, 8, seed=2)
    products = [
        s1 * squeezed.up @ squeezed.down
        for s1 in (0.5, 3.0)
        for squeezed in [squeeze_factors(up, down, 2, 2.0, s1)]
    ]
    torch.testing.assert_close(*products, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"energy": 0.0}, "energy must lie in"),
        ({"energy": 1.1}, "energy must lie in"),
        ({"energy": math.nan}, "energy must lie in"),
        ({"max_error": 1.0}, "max_error must lie between 0 and 1"),
        ({"rank": 2, "energy": 0.5}, "each choose the rank"),
        ({"energy": 0.5, "max_error": 0.1}, "each choose the rank"),
        ({"share": "error"}, "share='error' shares out a rank"),
        ({"rank": 2, "share": "fair"}, "share must be one of uniform, error"),
        ({"data": [torch.ones(1, 8)]}, "data= weighs what is approximated"),
        ({"rank": 2, "out": "folder"}, "out= belongs to squeezing a file"),
    ],
)
def test_what_cannot_be_chosen_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    model = disturbed(adapted("lora", rank=4))
    before = change(model)
    with pytest.raises(InvalidOption, match=sentence):
        rf.squeeze(model, **options)
    assert torch.equal(change(model), before)


def test_data_for_an_embedding_are_refused_and_leave_it_as_it_is() -> None:
    model = rf.adapt(nn.Sequential(nn.Embedding(9, 6)), "lora", rank=3, targets=["0"])
    disturbed(model)
    before = leaves_of(model)["up"].detach().clone()
    with pytest.raises(UnsupportedLayer, match="embedding"):
        rf.squeeze(model, 1, data=[torch.tensor([[1, 2]])], progress=False)
    assert torch.equal(leaves_of(model)["up"], before)


def test_data_weigh_a_convolution_too() -> None:
    model = rf.adapt(nn.Sequential(nn.Conv2d(3, 5, 2)).double(), "lora", rank=4, targets=["0"])
    plain = rf.adapt(nn.Sequential(nn.Conv2d(3, 5, 2)).double(), "lora", rank=4, targets=["0"])
    plain.load_state_dict(disturbed(model).state_dict())
    x = normal(4, 3, 6, 6) * torch.tensor([9.0, 1.0, 0.1])[:, None, None]
    before = model(x)
    rf.squeeze(model, 2, data=[x], progress=False)
    rf.squeeze(plain, 2)
    assert torch.linalg.vector_norm(model(x) - before) < torch.linalg.vector_norm(plain(x) - before)


def test_a_model_that_was_not_adapted_is_the_linear_layer_it_was() -> None:
    assert isinstance(
        rf.remove(rf.squeeze(disturbed(adapted("lora", linear(), rank=4)), energy=0.5))[0], nn.Linear
    )
