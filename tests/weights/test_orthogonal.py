"""The words of multiplicative changes, and noise and repetition inside a product."""

import pytest
import torch
from torch import Tensor

from rankfold import weights as w
from rankfold.weights import trained


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_cayley_leaf_is_the_cayley_transform_of_the_skew_matrix_of_its_numbers() -> None:
    numbers = normal(3, 6)
    rotations = w.Cayley(trained(numbers, "s"), 4, "r").tensor()
    for row, rotation in zip(numbers, rotations, strict=True):
        skew = torch.zeros(4, 4, dtype=torch.float64)
        skew[0, 1:], skew[1, 2:], skew[2, 3] = row[:3], row[3:5], row[5]
        skew = skew - skew.T
        identity = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(rotation, (identity + skew) @ torch.linalg.inv(identity - skew))
        torch.testing.assert_close(rotation @ rotation.T, identity)
    with pytest.raises(ValueError, match="size 5 has 10 free numbers"):
        w.Cayley(trained(numbers, "s"), 5, "r")


def test_rotations_are_kept_without_gradients_until_their_numbers_change() -> None:
    leaf = w.Cayley(trained(normal(2, 3), "s"), 3, "r")
    with torch.no_grad():
        first = leaf.tensor()
        assert leaf.tensor() is first
        leaf.numbers.tensor().mul_(2)
        assert not torch.equal(leaf.tensor(), first)
    assert leaf.tensor().requires_grad


def test_an_identity_changes_nothing_and_costs_nothing() -> None:
    one, x = w.Identity(4, torch.float64), normal(3, 4)
    assert one(x) is x
    assert torch.equal(one.dense(), torch.eye(4, dtype=torch.float64))
    assert one.T is one
    assert one.macs(10) == 0
    assert str(one) == "I[4]"


def test_a_shifted_expression_has_its_rows_rolled_by_their_number() -> None:
    matrix, x = normal(4, 4), normal(3, 4, seed=1)
    shifted = w.Shifted(trained(matrix, "m"))
    rolled = torch.stack([row.roll(i) for i, row in enumerate(matrix)])
    assert torch.equal(shifted.dense(), rolled)
    torch.testing.assert_close(shifted(x), x @ rolled.T)
    with pytest.raises(ValueError, match="only a square expression"):
        w.Shifted(trained(normal(3, 4), "m"))


@pytest.mark.parametrize("together", [False, True])
def test_noise_between_two_factors_is_neither_multiplied_away_nor_kept(together: bool) -> None:
    up, down = trained(normal(6, 3), "up"), trained(normal(3, 6, seed=1), "down")
    product = w.Dropped(up, 0.5, together=together) @ down
    x = normal(200, 6, seed=2)
    with torch.no_grad():
        quiet = product.eval()(x)
        noisy = [product.train()(x) for _ in range(2)]
    torch.testing.assert_close(quiet, x @ (up.value @ down.value).T)
    assert not torch.equal(noisy[0], noisy[1])
    if together:
        solution = torch.linalg.lstsq(x, noisy[0]).solution.T  # one matrix for all tokens
        torch.testing.assert_close(x @ solution.T, noisy[0])
    assert [pair.up for pair in product.pairs()] == [up]


def test_a_mask_larger_than_its_leaf_repeats_it() -> None:
    value, mask = normal(2, 3), (normal(2, 6, seed=1) > 0).double()
    masked = w.Masked(trained(value, "m"), mask, "masked")
    assert masked.shape == (2, 6)
    assert torch.equal(masked.tensor(), torch.cat([value, value], 1) * mask)


def test_rows_of_a_pool_are_laid_one_after_another() -> None:
    root = torch.nn.Module()
    root.register_parameter("pool", torch.nn.Parameter(normal(5, 2)))
    leaf = w.Pooled(root, "pool", "rows", (2, 6), index=torch.tensor([[0, 3, 1], [4, 4, 2]]))
    pool = root.get_parameter("pool")
    assert torch.equal(leaf.tensor()[1], torch.cat([pool[4], pool[4], pool[2]]))


def test_a_product_with_kronecker_factors_is_applied_factor_by_factor() -> None:
    kron = w.Kronecker(trained(normal(8, 2), "a"), trained(normal(8, 2, seed=1), "b"))
    core = w.frozen(normal(4, 4, seed=2), "core")
    product, x = kron @ core @ kron.T, normal(3, 64, seed=3)
    assert product.small_rank() is None
    torch.testing.assert_close(product(x), x @ product.dense().T)


def test_the_count_of_a_train_includes_forming_its_halves() -> None:
    cores = [trained(normal(*s, seed=i), f"c{i}") for i, s in enumerate([(1, 2, 3), (3, 4, 2), (2, 5, 1)])]
    assert w.TensorTrain(cores, outputs=2).macs(10) == 10 * 2 * (8 + 5) + 2 * 24
