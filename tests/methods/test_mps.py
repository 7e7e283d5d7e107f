"""MPS: a tensor train over the digits of both indices."""

import math
from itertools import pairwise

import pytest
import torch
from methods._layers import adapted, change, count, disturbed, leaves_of, linear, normal, rank_of

from rankfold.methods.modes import bonds, prime_digits


def cuts(matrix: torch.Tensor, digits: list[int]) -> list[int]:
    return [rank_of(matrix.reshape(math.prod(digits[:cut]), -1)) for cut in range(1, len(digits))]


@pytest.mark.parametrize(("out", "columns"), [(8, 16), (12, 10), (7, 9)])
def test_the_rank_across_every_cut_is_its_bond(out: int, columns: int) -> None:
    digits = prime_digits(out) + prime_digits(columns)
    model = disturbed(adapted("mps", linear(out, columns), rank=3))
    assert cuts(change(model), digits) == bonds(digits, 3)[1:-1]


def test_lora_bounds_the_cut_between_rows_and_columns_only() -> None:
    digits = [2] * 7
    lora = cuts(change(disturbed(adapted("lora", linear(8, 16), rank=2))), digits)
    train = cuts(change(disturbed(adapted("mps", linear(8, 16), rank=2))), digits)
    assert lora == [2, 4, 2, 4, 4, 2]
    assert train == [2] * 6


def test_the_change_is_the_contraction_of_the_cores() -> None:
    model = disturbed(adapted("mps", linear(6, 4), rank=2, alpha=6))
    cores = [leaves_of(model)[f"core{k}"].detach() for k in range(4)]
    assert [core.shape[1] for core in cores] == [3, 2, 2, 2]
    expected = 3 * torch.einsum("aob,bpc,cid,dje->opij", *cores).reshape(6, 4)
    torch.testing.assert_close(change(model), expected)


def test_trained_numbers_are_those_of_the_cores() -> None:
    model = adapted("mps", linear(16, 16), rank=3)
    caps = [1, 2, 3, 3, 3, 3, 3, 2, 1]
    assert count(model) == sum(2 * left * right for left, right in pairwise(caps))


def test_bonds_that_hold_everything_reach_every_matrix() -> None:
    assert bonds([2, 2, 2, 2], 99) == [1, 2, 4, 2, 1]
    assert rank_of(change(disturbed(adapted("mps", linear(8, 8), rank=99)))) == 8


def test_at_the_start_only_the_last_core_is_zero_and_only_it_has_a_gradient() -> None:
    model, x = adapted("mps", linear(6, 8), rank=2), normal(5, 8)
    assert torch.equal(model(x), linear(6, 8)(x))
    model(x).square().sum().backward()
    moved = [name for name, leaf in leaves_of(model).items() if leaf.grad.any()]
    empty = [name for name, leaf in leaves_of(model).items() if not leaf.any()]
    assert moved == empty == ["core4"]


def test_a_core_starts_with_a_variance_of_one_over_the_bond_before_it() -> None:
    leaves = leaves_of(adapted("mps", linear(2**7, 2**7), rank=32))
    inner = [core for core in leaves.values() if core.numel() >= 1024 and core.any()]
    assert len(inner) == 6
    for core in inner:
        assert core.std().item() == pytest.approx(core.shape[0] ** -0.5, rel=0.08)


@pytest.mark.parametrize(
    ("size", "digits"), [(1, [1]), (2, [2]), (12, [3, 2, 2]), (97, [97]), (768, [3] + [2] * 8), (25, [5, 5])]
)
def test_digits_are_the_prime_factors_from_the_largest(size: int, digits: list[int]) -> None:
    assert prime_digits(size) == digits
