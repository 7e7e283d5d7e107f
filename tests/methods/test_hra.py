"""HRA: a product of Householder reflections on the input side."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from methods._layers import (
    adapted,
    base,
    change,
    count,
    disturbed,
    expression_of,
    leaves_of,
    linear,
    normal,
    rank_of,
)  # fmt: skip
from methods._peft import DTYPES, HOSTS, assert_parity, twins
from peft import HRAConfig
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidRank
from rankfold.methods.structures.hra import penalty


def layout(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    yield "vectors", layer.hra_u["default"], torch.Tensor.clone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Square windows only: peft counts the first side of a window twice. Without its Gram-Schmidt form, which
# normalises rounding errors where vectors start as copies.
@pytest.mark.parametrize("host", ["perceptron", "convolution", "llama"])
def test_outputs_and_gradients_are_pefts(host: str, dtype: torch.dtype) -> None:
    assert_parity(twins(HOSTS[host], dtype, "hra", HRAConfig(r=4), layout, rank=4))


def changed(shape: tuple[int, int] = (6, 8)) -> tuple[nn.Module, Tensor]:
    model = disturbed(adapted("hra", linear(*shape), rank=4))
    return model, expression_of(model).dense().detach()


def test_the_gram_matrix_of_the_rows_is_kept_and_that_of_the_columns_is_not() -> None:
    model, matrix = changed()
    torch.testing.assert_close(matrix @ matrix.T, base(model) @ base(model).T)
    assert not torch.allclose(matrix.T @ matrix, base(model).T @ base(model), atol=1e-2)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_singular_values_are_kept_and_the_change_has_the_rank(shape: tuple[int, int]) -> None:
    model, matrix = changed(shape)
    torch.testing.assert_close(torch.linalg.svdvals(matrix), torch.linalg.svdvals(base(model)))
    assert rank_of(change(model)) == 4


def test_the_reflections_stand_in_the_order_of_their_vectors() -> None:
    model, matrix = changed()
    expected = base(model)
    for vector in leaves_of(model)["vectors"].detach().T:
        unit = vector / vector.norm()
        expected = expected @ (torch.eye(8, dtype=torch.float64) - 2 * torch.outer(unit, unit))
    torch.testing.assert_close(matrix, expected)


def test_an_even_number_of_reflections_keeps_the_determinant() -> None:
    model, matrix = changed((8, 8))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.linalg.det(base(model)))


def test_vectors_start_in_equal_pairs_so_the_start_is_the_base() -> None:
    model, x = adapted("hra", rank=4), normal(5, 8)
    vectors = leaves_of(model)["vectors"]
    assert torch.equal(vectors[:, 0::2], vectors[:, 1::2])
    assert not torch.allclose(vectors[:, 0], vectors[:, 2])
    torch.testing.assert_close(model(x), linear()(x))
    assert count(model) == 4 * 8


def test_a_pair_parts_in_the_first_step() -> None:
    model = adapted("hra", rank=4)
    (model(normal(5, 8)) * normal(5, 6, seed=3)).sum().backward()
    gradient = leaves_of(model)["vectors"].grad
    assert not torch.allclose(gradient[:, 0], gradient[:, 1])


def test_the_penalty_is_the_distance_of_the_unit_vectors_from_orthonormality() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)).double()
    rf.adapt(model, "hra", rank=4)
    disturbed(model)
    expected = 0.0
    for path in ("0", "1"):
        vectors = leaves_of(model, path)["vectors"]
        unit = vectors / vectors.norm(dim=0)
        expected = expected + (torch.eye(4) - unit.T @ unit).norm()
    torch.testing.assert_close(penalty(model), expected)
    penalty(model).backward()
    assert leaves_of(model, "1")["vectors"].grad.norm() > 0


def test_orthonormal_vectors_cost_nothing() -> None:
    model = adapted("hra", rank=4)
    leaves_of(model)["vectors"].data = 3 * torch.linalg.qr(normal(8, 4)).Q
    assert penalty(model) < 1e-12


def test_an_odd_rank_is_refused() -> None:
    with pytest.raises(InvalidRank, match="rank 3 is not a multiple of 2"):
        adapted("hra", rank=3)
