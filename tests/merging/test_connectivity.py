"""The line between two models: its barrier, what matching does to it, and its report."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.linalg import polar_factor
from rankfold.merging.connectivity import (
    Connectivity,
    Curve,
    alignment,
    distance,
    interpolated,
    loss_curve,
    mean_loss,
    reset_statistics,
)
from rankfold.merging.matching import match_many, matched
from rankfold.merging.papers.lmc import lmc
from rankfold.merging.permutations import named_tensors, permuted
from rankfold.merging.symmetries import specification

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@cache
def digits() -> tuple[Batch, Batch]:
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


@cache
def trained(seed: int, width: int = 128) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = digits()[0]
    for step in range(120):
        rows = torch.arange(128) + 128 * (step % 9)
        optimizer.zero_grad()
        loss(model, (x[rows], y[rows])).backward()
        optimizer.step()
    return model.eval()


@cache
def report() -> Connectivity:
    return lmc(trained(0), trained(1), [digits()[1]], loss=loss)


def test_matching_lowers_the_barrier_between_two_runs_from_two_seeds() -> None:
    assert report().before.barrier > 0.2
    assert report().after.barrier < 0.5 * report().before.barrier


def test_matching_does_not_move_the_ends_of_the_line() -> None:
    before, after = report().before, report().after
    assert after.losses[0] == before.losses[0]
    assert after.losses[-1] == pytest.approx(before.losses[-1], rel=1e-4)


def test_matching_reduces_the_distance_by_some_tens_of_percent_only() -> None:
    assert 0.5 < report().distance_ratio < 1


def test_matching_aligns_the_strong_singular_vectors_more_than_all_of_them() -> None:
    gains = {gamma: after - before for gamma, (before, after, _) in report().alignments.items()}
    assert gains[0.5] > 0.2
    assert gains[0.5] > 2 * gains[0.0]


def test_the_matched_models_stay_aligned_with_the_merged_one() -> None:
    before, after, middle = report().alignments[0.5]
    assert middle > after > before


def test_permutations_leave_singular_values_alone() -> None:
    model = copy.deepcopy(trained(1)).double()
    twin = matched(model, to=trained(0))
    for name, tensor in named_tensors(twin).items():
        if tensor.dim() > 1:
            mine, other = (torch.linalg.svdvals(one.double()) for one in (tensor, named_tensors(model)[name]))
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_three_matched_runs_average_better_than_three_runs_as_they_are() -> None:
    models = [trained(seed) for seed in range(3)]
    spec = specification(models[0])
    found = match_many([named_tensors(model).__getitem__ for model in models], spec)
    moved = [permuted(model, spec, orders) for model, orders in zip(models, found, strict=True)]

    def average(three: list[nn.Module]) -> float:
        middle = interpolated(interpolated(three[0], three[1], 1 / 2), three[2], 1 / 3)
        return mean_loss(middle, [digits()[1]], loss=loss)

    assert average(moved) < 0.7 * average(list(models))


def test_a_model_is_fully_aligned_with_itself_at_every_threshold() -> None:
    model = trained(0)
    found = alignment(model, model, [0.0, 0.3, 0.9, 1.0])
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-10)


def test_alignment_of_all_components_is_the_product_of_the_polar_factors() -> None:
    torch.manual_seed(0)
    one, other = (nn.Linear(7, 4, bias=False, dtype=torch.float64) for _ in range(2))
    expected = float((polar_factor(one.weight) * polar_factor(other.weight)).sum().detach()) / 4
    assert alignment(one, other, [0.0])[0.0] == pytest.approx(expected, abs=1e-10)


def test_a_weight_that_is_zero_has_no_components_to_align() -> None:
    torch.manual_seed(0)
    model, empty = nn.Linear(5, 3), nn.Linear(5, 3)
    nn.init.zeros_(empty.weight)
    assert alignment(model, empty, [0.0]) == {0.0: 0.0}


def test_the_barrier_is_the_largest_rise_above_the_straight_line_between_the_ends() -> None:
    assert Curve((0.0, 0.25, 0.5, 1.0), (1.0, 3.0, 2.0, 5.0)).barrier == 1.0
    assert Curve((0.0, 0.5, 1.0), (1.0, 0.0, 1.0)).barrier == 0.0


def test_points_on_the_line_are_means_of_the_weights_with_those_shares() -> None:
    one, other = trained(0), trained(1)
    point = interpolated(one, other, 0.25)
    torch.testing.assert_close(point[0].weight, 0.75 * one[0].weight + 0.25 * other[0].weight)  # type: ignore[index]
    assert torch.equal(interpolated(one, other, 0.0)[0].weight, one[0].weight)  # type: ignore[index]


def test_the_mean_loss_counts_every_example_once() -> None:
    x, y = digits()[1]
    parts = [(x[:100], y[:100]), (x[100:107], y[100:107])]
    whole = mean_loss(trained(0), [(x[:107], y[:107])], loss=loss)
    assert mean_loss(trained(0), parts, loss=loss) == pytest.approx(whole, rel=1e-5)


def with_norms(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = nn.Sequential(*parts).double()
    model.train()(torch.randn(64, 5, dtype=torch.float64) * 3 + 1)
    return model.eval()


def test_resetting_measures_running_statistics_on_the_batches_and_restores_everything_else() -> None:
    model, data = with_norms(0), [torch.randn(9, 5, dtype=torch.float64) for _ in range(3)]
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    reset_statistics(model, data)
    hidden = [model[0](x).detach() for x in data]
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())


def test_the_loss_between_models_with_batch_norms_is_that_of_measured_statistics() -> None:
    one, other = with_norms(0), with_norms(1)
    x = torch.randn(32, 5, dtype=torch.float64)
    curve = loss_curve(one, other, [x], loss=lambda model, x: model(x).square().mean(), points=3)
    middle = interpolated(one, other, 0.5)
    stale = float(middle(x).square().mean().detach())
    reset_statistics(middle, [x])
    assert curve.losses[1] == pytest.approx(float(middle(x).square().mean().detach()), rel=1e-12)
    assert abs(curve.losses[1] - stale) > 1e-3


def test_the_report_says_everything_before_and_after() -> None:
    found = report().to_dict()
    assert found["barrier"]["after"] < found["barrier"]["before"]
    assert len(found["losses"]["after"]) == len(found["shares"]) == 11
    assert set(found["alignment"]["0.5"]) == {"before", "after", "merged"}
    for word in ("barrier", "distance", "R(0.5)"):
        assert word in str(report())


def test_the_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    report().save_picture(tmp_path / "line.png")
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidOption, match="writes no such pictures"):
        report().save_picture(tmp_path / "line.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["line.png"]


def test_equal_models_have_no_distance_and_nothing_to_gain() -> None:
    found = lmc(trained(0), trained(0), [digits()[1]], loss=loss, points=3)
    assert distance(trained(0), trained(0)) == 0
    assert found.distance_ratio == 1
    assert found.after == found.before


@pytest.mark.parametrize("options", [{"points": 1}, {"gammas": (0.5, 1.5)}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOption, match=r"lmc: (points|gammas) must be"):
        lmc(trained(0), trained(1), [digits()[1]], loss=loss, **options)  # type: ignore[arg-type]


def test_no_batches_are_refused() -> None:
    with pytest.raises(InvalidOption, match="no batches"):
        loss_curve(trained(0), trained(1), [], loss=loss)


def test_it_is_a_method_of_analysis() -> None:
    assert rf.find_method("analysis=lmc").build is lmc


def test_the_curve_runs_from_the_first_model_to_the_second() -> None:
    batches = [digits()[1]]
    curve = loss_curve(trained(0), trained(1), batches, loss=loss, points=2)
    ends = tuple(mean_loss(trained(seed), batches, loss=loss) for seed in range(2))
    assert curve.losses == pytest.approx(ends, rel=1e-5)
    assert all(a < b for a, b in itertools.pairwise(curve.shares))
