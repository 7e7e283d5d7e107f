"""Weights that change their form: what is there before, what stands in its place, and what a file adopts."""

import pytest
import torch
from torch import Tensor

from rankfold import weights as w
from rankfold.weights import Dense, adopt_selections, frozen, owned, trained


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product() -> w.Weight:
    return trained(normal(6, 2), "up") @ trained(normal(2, 8, seed=1), "down")


def stored(expression: w.Weight) -> dict[str, Tensor]:
    return {name: getattr(*place).detach() for name, place in owned(expression).items()}


def guided(alpha: float) -> w.Guided:
    guide = Dense(normal(6, 8, seed=2), "guide", trainable=True)
    weight = w.Guided(product(), guide, Dense(torch.ones(2).double(), "guide.share", trainable=False))
    with torch.no_grad():
        weight.steer(alpha)
    return weight


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_a_guide_has_its_share_of_the_output(alpha: float) -> None:
    weight, x, bias = guided(alpha), normal(5, 8, seed=3), normal(6, seed=4)
    wanted = alpha * weight.leaf("guide").dense() + (1 - alpha) * product().dense()
    torch.testing.assert_close(weight.dense(), wanted)
    torch.testing.assert_close(weight(x, bias), x @ wanted.T + bias)
    torch.testing.assert_close(weight.rows(torch.tensor([2, 0])), wanted[[2, 0]])
    assert weight.factored() is None
    assert [pair.additive for pair in weight.pairs()] == [False]


def test_the_guide_trains_on_the_output_side_so_that_it_leaves_no_group_empty() -> None:
    sides = {leaf.name: side for leaf, side in guided(0.5).sides()}
    assert sides == {"up": "output", "down": "input", "guide": "output"}


def test_a_guide_that_is_left_out_of_a_step_is_there_in_evaluation() -> None:
    weight, x = guided(0.3), normal(5, 8, seed=3)
    mixed = weight(x)
    weight.steer(0.3, skips=True)
    torch.testing.assert_close(weight.train()(x), product()(x))
    torch.testing.assert_close(weight.eval()(x), mixed)


def test_without_its_guide_a_weight_is_what_it_was_beside_it() -> None:
    weight, x = guided(0.3), normal(5, 8, seed=3)
    weight.release()
    assert torch.equal(weight(x), product()(x))
    assert sorted(stored(weight)) == ["down", "up"]
    assert weight.formula() == product().formula()
    assert weight.small_rank() == 2


def test_a_guide_adopts_what_a_file_holds() -> None:
    weight, other = guided(0.3), guided(0.3)
    weight.steer(0.3, skips=True)
    adopt_selections(other, stored(weight))
    assert other.skips
    weight.release()
    adopt_selections(other, stored(weight))
    assert other.guide is None


def test_factors_that_are_multiplied_out_keep_the_function() -> None:
    weight, x, bias = w.Densifying(product()), normal(5, 8, seed=3), normal(6, seed=4)
    before = weight(x, bias)
    weight.densify()
    torch.testing.assert_close(weight(x, bias), before)
    assert list(stored(weight)) == ["weight"]
    assert weight.leaf("weight").trainable
    assert not list(weight.sides())
    other = w.Densifying(product())
    adopt_selections(other, stored(weight))
    assert list(stored(other)) == ["weight"]


@pytest.mark.parametrize("window", [(), (3, 2)])
def test_a_matrix_is_taken_apart_as_it_is_seen(window: tuple[int, ...]) -> None:
    matrix = normal(6, 24)
    weight = w.Factoring(Dense(matrix, "weight", trainable=True), window)
    seen = weight.seen(matrix)
    if window:
        kernel = matrix.reshape(6, 4, 3, 2)
        assert seen[1 * 3 + 2, 5 * 2 + 1] == kernel[5, 1, 2, 1]
        assert seen.shape == (12, 12)
    assert torch.equal(weight.unseen(seen), matrix)
    left, right = normal(len(seen), 3, seed=1), normal(3, seen.shape[1], seed=2)
    wanted = weight.unseen(left @ right)
    weight.split(left, right)
    torch.testing.assert_close(weight.dense(), wanted)
    names = ["horizontal", "vertical"] if window else ["down", "up"]
    assert sorted(stored(weight)) == names
    other = w.Factoring(Dense(matrix, "weight", trainable=True), window)
    adopt_selections(other, stored(weight))
    assert {k: v.shape for k, v in stored(other).items()} == {k: v.shape for k, v in stored(weight).items()}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_separable_kernel_is_the_convolution_with_it(groups: int, mode: str) -> None:
    vertical, horizontal = normal(3, 12, seed=1), normal(6, 6, seed=2)
    weight = w.Separable(trained(vertical, "v"), trained(horizontal, "h"), (3, 2))
    kernel = torch.einsum("oqj,qci->ocij", horizontal.reshape(6, 3, 2), vertical.reshape(3, 4, 3))
    torch.testing.assert_close(weight.dense(), kernel.flatten(1))
    x, bias = normal(2, 4 * groups, 7, 6, seed=5), normal(6, seed=6)
    op = w.Convolution((3, 2), (2, 1), (1, 2), (1, 2), groups, mode, (2, 2, 1, 1))
    module = torch.nn.Conv2d(4 * groups, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups, padding_mode=mode)
    module = module.double()
    module.weight.data, module.bias.data = kernel, bias
    torch.testing.assert_close(weight(x, bias, op), module(x))
    assert weight.macs(5) == 5 * (3 * 12 + 6 * 6)
    torch.testing.assert_close(weight(normal(5, 24)), normal(5, 24) @ weight.dense().T)


def test_a_matrix_alone_is_applied_with_its_bias_in_one_product() -> None:
    weight, x, bias = w.Factoring(frozen(normal(6, 8))), normal(5, 8, seed=3), normal(6, seed=4)
    assert torch.equal(weight(x, bias), torch.nn.functional.linear(x, normal(6, 8), bias))
