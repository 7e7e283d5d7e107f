"""Matrices of distances, of which only the largest entries count."""

import pytest
import torch
from torch import Tensor
from weights.test_kernels import saved_numbers

from rankfold import weights as w
from rankfold.weights.competing import Competing, DroppedPath, largest


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def competing(kept: int = 9, shrink: str = "magnitude", out: int = 5, columns: int = 7) -> Competing:
    output, inputs = w.trained(draw(2, out, 3), "output"), w.trained(draw(2, columns, 3, seed=1), "inputs")
    return Competing(output, inputs, kept, shrink=shrink)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_exactly_as_many_entries_are_kept_as_asked_for_though_many_are_equal(count: int) -> None:
    values = torch.tensor([[2.0, 3.0, 2.0, 2.0], [1.0, 2.0, 1.0, 3.0]])
    kept, threshold = largest(values, count)
    order = values.flatten().argsort(descending=True, stable=True)
    wanted = torch.zeros(8).index_put((order[:count],), values.flatten()[order[:count]])
    assert torch.equal(kept.flatten(), wanted)
    assert threshold == (values[kept == 0].max() if count < 8 else 0)


def test_zeros_are_kept_as_zeros() -> None:
    kept, threshold = largest(torch.tensor([0.0, 0.0, 2.0, 0.0]), 2)
    assert (kept.tolist(), threshold.item()) == ([0, 0, 2, 0], 0)


def test_more_entries_are_compared_than_a_quantile_can_be_taken_of() -> None:
    values = torch.rand(2**24 + 8, generator=torch.Generator().manual_seed(0)) + 0.5
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.9)
    kept, threshold = largest(values, 1000)
    assert torch.count_nonzero(kept) == 1000
    assert kept[kept > 0].min() >= threshold == values[kept == 0].max()


def test_what_is_compiled_keeps_the_same_entries() -> None:
    values = draw(6, 7).abs().round(decimals=1)
    compiled = torch.compile(largest, fullgraph=True, backend="eager")
    for count in (3, 20, 42):
        for mine, wanted in zip(compiled(values, torch.tensor([count])), largest(values, count), strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("shrink", ["magnitude", "soft", "hard"])
def test_an_entry_that_is_kept_is_worth_what_the_shrinking_says(shrink: str) -> None:
    weight = competing(shrink=shrink)
    kernel = weight.kernel()
    magnitude = kernel.abs()
    order = magnitude.flatten().sort(descending=True).values
    mask, threshold = magnitude >= order[8], order[9]
    worth = {"magnitude": kernel * magnitude, "soft": kernel.sign() * (magnitude - threshold), "hard": kernel}
    assert torch.equal(weight.dense(), torch.where(mask, worth[shrink], 0))


def test_the_gradient_takes_the_magnitude_and_the_threshold_for_constants() -> None:
    for shrink in ("magnitude", "soft", "hard"):
        weight = competing(shrink=shrink)
        output, inputs = (leaf.tensor() for leaf in (weight.output, weight.inputs))
        steps = output[:, :, None] - inputs[:, None]
        distance = steps.square().sum(-1).sqrt()
        kernel = 0.1 * (distance[0] - distance[1])
        factor = (kernel.detach().abs() if shrink == "magnitude" else 1) * (weight.dense() != 0)
        probe = draw(5, 7, seed=3)
        wanted = torch.autograd.grad((kernel * factor * probe).sum(), [output, inputs])
        actual = torch.autograd.grad((weight.dense() * probe).sum(), [output, inputs])
        for mine, expected in zip(actual, wanted, strict=True):
            torch.testing.assert_close(mine, expected)


def test_at_distance_zero_the_gradient_is_finite_and_the_pair_pulls_at_nothing() -> None:
    weight = competing(kept=35, shrink="hard")
    output, inputs = (leaf.tensor() for leaf in (weight.output, weight.inputs))
    with torch.no_grad():
        output[:, 2] = inputs[:, 4]
    assert weight.kernel()[2, 4] == 0
    weight.dense()[2, 4].backward()
    assert not output.grad.any()
    assert not inputs.grad.any()
    weight.dense().sum().backward()
    assert output.grad.isfinite().all()
    assert inputs.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 64])
def test_nothing_of_the_matrix_is_kept_for_backward(tokens: int) -> None:
    weight = competing(out=30, columns=40)
    x = draw(tokens, 40).requires_grad_()
    known = [x, *weight.parameters()]
    assert saved_numbers(lambda: weight(x), known) == 0
    assert saved_numbers(weight.dense, known) == 0


def test_without_gradients_the_matrix_is_formed_once_and_given_up_by_training() -> None:
    weight, x = competing(), draw(2, 7)
    with torch.no_grad():
        weight(x)
        assert weight.keep() is weight.keep()
    weight.dense()
    assert weight._kept is None


def test_a_dropped_path_leaves_whole_samples_out_and_scales_the_others_up() -> None:
    weight = DroppedPath(competing(), 0.5).train()
    x = draw(40, 3, 7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = weight(x)
    plain = x @ weight.dense().T
    gone = (y == 0).flatten(1).all(1)
    assert 5 < gone.sum() < 35
    torch.testing.assert_close(y[~gone], 2 * plain[~gone])
    torch.testing.assert_close(weight.eval()(x), plain)
