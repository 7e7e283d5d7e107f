"""Affine and rectified leaves: vectors that are scaled and shifted, changes that a rectifier lets pass."""

import pytest
import torch
from torch import Tensor

from rankfold import weights as w


def leaf(*values: float, trainable: bool = True, name: str = "leaf") -> w.Dense:
    return w.Dense(torch.tensor(values, dtype=torch.float64), name, trainable=trainable)


def test_an_affine_leaf_scales_and_shifts_entry_by_entry() -> None:
    made = w.Affine(leaf(2.0, 3.0), leaf(5.0, 7.0, trainable=False), leaf(1.0, -1.0), "made")
    assert made.tensor().tolist() == [11, 20]
    assert made.trainable
    assert not w.Affine(*[leaf(1.0, trainable=False)] * 3, "made").trainable


def test_a_rectified_vector_stops_where_the_sum_would_be_negative() -> None:
    made = w.Rectified(leaf(2.0, 3.0, 0.0, trainable=False), leaf(-1.0, -4.0, 0.0), "made")
    assert made.tensor().tolist() == [-1, -3, 0]


@pytest.mark.parametrize(
    ("everywhere", "expected"), [(True, [[-2.0, 5.0], [0.0, 1.0]]), (False, [[-2.0, 5.0], [-6.0, 1.0]])]
)
def test_a_rectified_matrix_stops_everywhere_or_on_its_diagonal(
    everywhere: bool, expected: list[list[float]]
) -> None:
    change = w.trained(torch.tensor([[-3.0, 5.0], [-6.0, 1.0]], dtype=torch.float64), "change")
    made = w.Rectified(leaf(2.0, 3.0, trainable=False), change, "made", everywhere=everywhere)
    assert made.tensor().tolist() == expected
    assert made.trainable
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert made(x).tolist() == (x @ torch.tensor(expected).double().T).tolist()


def test_gradients_pass_where_the_sum_is_positive_only() -> None:
    change = w.trained(torch.tensor([[-3.0, 5.0], [-6.0, 1.0]], dtype=torch.float64), "change")
    total: Tensor = w.Rectified(leaf(2.0, 3.0, trainable=False), change, "made").tensor().sum()
    total.backward()
    assert change.value.grad is not None
    assert change.value.grad.tolist() == [[0, 1], [0, 1]]
