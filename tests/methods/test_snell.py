"""SNELL: the largest entries of a kernel matrix, and zeros elsewhere."""

import math

import pytest
import torch
from methods._layers import adapted, change, count, disturbed, leaves_of, linear, normal, rank_of, trained
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption


def _kernel(model: nn.Module) -> Tensor:
    """Return K from the leaves, one distance after the other."""
    output, inputs = (leaves_of(model)[name] for name in ("output", "inputs"))
    distance = (output[:, :, None] - inputs[:, None]).norm(dim=-1)
    return 0.1 * (distance[0] - distance[1])


@pytest.mark.parametrize("zeroed", [0.3, 0.5, 0.9, 0.99])
def test_in_every_step_exactly_the_promised_entries_are_not_zero_and_they_are_the_largest(
    zeroed: float,
) -> None:
    model = adapted("snell", linear(10, 12), rank=4, zeroed=zeroed)
    optimizer = torch.optim.Adam(trained(model).values(), lr=0.05)
    supports = []
    for step in range(12):
        optimizer.zero_grad()
        (model(normal(8, 12)) - normal(8, 10, seed=2)).square().sum().backward()
        optimizer.step()
        support = change(model) != 0
        kept = math.ceil(round((1 - zeroed) * 120))
        assert support.sum() == kept, step
        magnitude = _kernel(model).abs()
        assert magnitude[support].min() > magnitude[~support].max()
        supports.append(support)
    assert zeroed == 0.99 or not torch.equal(supports[0], supports[-1])


def test_the_change_is_the_kernel_times_its_magnitude_and_with_nothing_zeroed_the_kernel() -> None:
    model = disturbed(adapted("snell", linear(10, 12), rank=4, zeroed=0.5))
    kernel = _kernel(model).detach()
    mask = kernel.abs() > kernel.abs().median()
    torch.testing.assert_close(change(model), torch.where(mask, kernel * kernel.abs(), 0))
    model = disturbed(adapted("snell", linear(10, 12), rank=4, zeroed=0.0))
    torch.testing.assert_close(change(model), _kernel(model).detach())


def test_factors_of_rank_four_give_a_change_of_full_rank() -> None:
    model = disturbed(adapted("snell", linear(20, 24), rank=4, zeroed=0.0))
    assert count(model) == 4 * (20 + 24)
    assert rank_of(change(model)) == 20
    output, inputs = (leaves_of(model)[name] for name in ("output", "inputs"))
    assert rank_of(torch.einsum("hiq,hjq->ij", output, inputs).detach()) == 4


def test_entries_below_the_threshold_get_no_gradient_and_those_above_do() -> None:
    model = disturbed(adapted("snell", linear(10, 12), rank=4, zeroed=0.5))
    support = change(model) != 0
    for kept in (True, False):
        row, column = (support == kept).nonzero()[3].tolist()
        model.zero_grad()
        model(torch.eye(12, dtype=torch.float64)[[column, column]])[0, row].backward()
        assert all(bool(p.grad.any()) == kept for p in trained(model).values())


def test_training_stays_finite_where_a_row_of_one_factor_is_a_row_of_the_other() -> None:
    model = adapted("snell", rank=4, zeroed=0.0)
    leaves_of(model)["output"].data[:, 1] = leaves_of(model)["inputs"].data[:, 2]
    model(normal(5, 8)).sum().backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values())


def test_the_start_is_that_of_the_official_code_and_close_to_the_base_in_a_wide_layer() -> None:
    model = adapted("snell", nn.Sequential(nn.Linear(300, 200)), rank=32)
    for name, side in (("output", 200), ("inputs", 300)):
        value = leaves_of(model)[name]
        assert value.shape == (2, side, 16)
        torch.testing.assert_close(value.abs().max().item(), 1 / math.sqrt(side * 16), rtol=0.01, atol=0)
    assert 0 < change(model).abs().max() < 1e-4


def test_with_a_path_that_is_dropped_some_samples_see_the_base_while_training() -> None:
    model, x = disturbed(adapted("snell", rank=4, drop_path=0.5)).train(), normal(30, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        same = (model(x) == linear()(x)).all(1)
    assert 0 < same.sum() < 30
    torch.testing.assert_close(model.eval()(x), rf.fold(model)(x))


@pytest.mark.parametrize(
    "options", [{"zeroed": 1.0}, {"zeroed": -0.1}, {"shrink": "less"}, {"drop_path": 1.0}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        adapted("snell", rank=4, **options)
