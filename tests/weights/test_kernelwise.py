"""Views and outer products of a kernel are what they say, formed here without the library."""

import pytest
import torch
from torch import Tensor

from rankfold import weights as w
from rankfold.weights import Convolution, frozen, trained


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_view_has_the_numbers_of_its_inside_row_after_row() -> None:
    up, down = normal(6, 2), normal(2, 4, seed=1)
    view = w.Viewed(trained(up, "up") @ trained(down, "down"), (3, 8))
    torch.testing.assert_close(view.dense(), (up @ down).reshape(3, 8))
    assert view.factored() is None
    assert [pair.additive for pair in view.pairs()] == [False]


def test_a_view_of_the_same_shape_is_applied_as_its_inside() -> None:
    up, down = normal(6, 2), normal(2, 4, seed=1)
    view = w.Viewed(trained(up, "up") @ trained(down, "down"), (6, 4))
    assert view.small_rank() == 2
    assert view.macs(5) == 5 * 2 * (6 + 4)
    x, bias = normal(5, 4, seed=2), normal(6, seed=3)
    torch.testing.assert_close(view(x, bias), x @ (up @ down).T + bias)


def test_a_view_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot view"):
        w.Viewed(trained(normal(6, 4), "a"), (5, 5))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_outer_products_on_a_convolution_are_the_convolution_with_their_kernel(
    groups: int, mode: str
) -> None:
    factors = [normal(size, 3, seed=size) for size in (6, 4, 3, 2)]
    kernel = torch.einsum("ot,it,ht,wt->oihw", *factors)
    expression = w.Polyadic([trained(factor, f"u{i}") for i, factor in enumerate(factors)])
    torch.testing.assert_close(expression.dense(), kernel.flatten(1))
    x, bias = normal(2, 4 * groups, 7, 6, seed=5), normal(6, seed=6)
    op = Convolution((3, 2), (2, 1), (1, 1), (1, 2), groups, mode, (1, 1, 1, 1))
    module = torch.nn.Conv2d(4 * groups, 6, (3, 2), (2, 1), 1, (1, 2), groups, padding_mode=mode).double()
    module.weight.data, module.bias.data = kernel, bias
    torch.testing.assert_close(expression(x, bias, op), module(x))


def test_outer_products_of_two_factors_are_a_pair() -> None:
    factors = [normal(5, 2), normal(4, 2, seed=1)]
    expression = w.Polyadic([trained(factor, f"u{i}") for i, factor in enumerate(factors)])
    torch.testing.assert_close(expression.dense(), factors[0] @ factors[1].T)
    assert expression.small_rank() == 2
    x = normal(3, 4, seed=2)
    torch.testing.assert_close(expression(x), x @ factors[1] @ factors[0].T)


def _convolutions(change: w.Weight, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    calls: list[tuple[int, ...]] = []
    kernel = Convolution._kernel
    monkeypatch.setattr(
        Convolution, "_kernel", lambda op, x, k, b: (calls.append(tuple(k.shape)), kernel(op, x, k, b))[1]
    )
    op = Convolution((3, 3), (1, 1), (1, 1), (1, 1))
    total = frozen(normal(6, 36)) + change
    wanted = torch.nn.functional.conv2d(x, total.dense().reshape(6, 4, 3, 3), padding=1)
    torch.testing.assert_close(total(x, op=op), wanted)
    return len(calls)


def test_a_viewed_change_of_a_kernel_is_added_to_it_before_one_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change = w.Viewed(trained(normal(18, 2), "up") @ trained(normal(2, 12, seed=1), "down"), (6, 36))
    assert _convolutions(change, normal(2, 4, 8, 8), monkeypatch) == 1


def test_few_outer_products_are_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [trained(normal(size, 1, seed=size), f"u{i}") for i, size in enumerate((6, 4, 3, 3))]
    assert _convolutions(w.Polyadic(factors), normal(2, 4, 8, 8), monkeypatch) == 2
