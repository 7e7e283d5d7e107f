import pytest
import torch
from torch import Tensor

from rankfold.errors import InvalidOption, InvalidRank
from rankfold.linalg import (
    NormalFloat,
    QuantisedLowRank,
    dequantise,
    quantise,
    quantised_low_rank,
    truncated_svd,
)

FORM = NormalFloat(3, 64, 8, 16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signal(scale: float = 1.0) -> Tensor:
    """Return noise with a part of rank 8 that stands out."""
    return scale * normal(128, 8) @ normal(8, 256, seed=1) + normal(128, 256, seed=2)


def coarse(found: QuantisedLowRank, form: NormalFloat = FORM) -> Tensor:
    return dequantise(found.tensors, form, (128, 256), torch.float64)


def rounded(matrix: Tensor, form: NormalFloat = FORM) -> Tensor:
    return dequantise(quantise(matrix, form), form, tuple(matrix.shape), torch.float64)


def test_rank_zero_is_the_format_alone() -> None:
    matrix = signal()
    for order in ("lq", "loftq"):
        found = quantised_low_rank(matrix, 0, FORM, order=order)
        assert torch.equal(coarse(found), rounded(matrix))
        assert found.up.shape == (128, 0)
        assert found.error == pytest.approx(float((matrix - rounded(matrix)).norm()))


def test_the_first_turn_decomposes_first_and_quantises_the_rest() -> None:
    matrix = signal()
    left, values, right = truncated_svd(matrix, 8)
    found = quantised_low_rank(matrix, 8, FORM, iterations=1)
    assert torch.allclose(found.up @ found.down, left * values @ right)
    assert torch.allclose(coarse(found), rounded(matrix - left * values @ right))
    assert torch.allclose(found.up.T @ found.up, found.down @ found.down.T)  # split evenly


def test_the_first_turn_of_loftq_keeps_the_format_of_the_matrix() -> None:
    matrix = signal()
    found = quantised_low_rank(matrix, 8, FORM, order="loftq", iterations=1)
    left, values, right = truncated_svd(matrix - rounded(matrix), 8)
    assert torch.equal(coarse(found), rounded(matrix))
    assert torch.allclose(found.up @ found.down, left * values @ right)


@pytest.mark.parametrize("order", ["lq", "loftq"])
def test_the_error_falls_until_the_turn_that_is_given(order: str) -> None:
    matrix, form = signal(), NormalFloat(2, 64, None)
    found = quantised_low_rank(matrix, 8, form, order=order)  # type: ignore[arg-type]
    assert 1 < len(found.errors) < 100
    assert all(a > b for a, b in zip(found.errors, found.errors[1:], strict=False))
    rest = matrix - coarse(found, form) - found.up @ found.down
    assert float(rest.norm()) == pytest.approx(found.error, rel=1e-6)
    more = quantised_low_rank(matrix, 8, form, order=order, iterations=len(found.errors) + 1)  # type: ignore[arg-type]
    assert more.errors == found.errors  # the turn after it was no better
    fewer = quantised_low_rank(matrix, 8, form, order=order, iterations=2)  # type: ignore[arg-type]
    assert fewer.errors == found.errors[:2]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_low_rank_part_is_better_taken_off_before_than_after(bits: int) -> None:
    form = NormalFloat(bits, 64, None)
    matrix = signal()
    lq, loftq = (quantised_low_rank(matrix, 8, form, order=o).error for o in ("lq", "loftq"))
    assert lq < 0.5 * loftq < float((matrix - rounded(matrix, form)).norm())


def test_the_scaling_is_taken_off_the_factors() -> None:
    matrix = signal()
    plain, scaled = (quantised_low_rank(matrix, 4, FORM, scaling=s, iterations=2) for s in (1.0, 0.25))
    assert torch.allclose(0.25 * scaled.up @ scaled.down, plain.up @ plain.down)


def test_weights_that_are_an_outer_product_are_met_exactly() -> None:
    matrix = signal()
    rows, columns = normal(128, seed=3).abs() + 0.1, normal(256, seed=4).abs() + 0.1
    weights = torch.outer(rows.square(), columns.square())
    found = quantised_low_rank(matrix, 8, FORM, weights=weights, iterations=1)
    rest = (matrix - found.up @ found.down) * weights.sqrt()
    tail = torch.linalg.svdvals(matrix * weights.sqrt())[8:]
    assert float(rest.norm()) == pytest.approx(float(tail.norm()), rel=1e-9)


def test_weights_lower_the_weighted_error() -> None:
    matrix = signal(0.1)
    weights = (
        normal(128, seed=3).exp()[:, None] * normal(256, seed=4).exp() * normal(128, 256, seed=5).exp()
    ).square()
    blind, seeing = (quantised_low_rank(matrix, 8, FORM, weights=w) for w in (None, weights))
    missed = (matrix - coarse(blind) - blind.up @ blind.down) * weights.sqrt()
    assert seeing.error < 0.95 * float(missed.norm())
    assert quantised_low_rank(matrix, 8, FORM, weights=torch.zeros_like(matrix)).errors == (0.0,)


def test_the_randomised_solver_comes_close_and_repeats() -> None:
    matrix = signal()
    exact = quantised_low_rank(matrix, 8, FORM, iterations=2).error
    found = [
        quantised_low_rank(
            matrix, 8, FORM, iterations=2, solver="randomised", generator=torch.Generator().manual_seed(0)
        )
        for _ in range(2)
    ]
    assert found[0].error == pytest.approx(exact, rel=0.01)
    assert torch.equal(found[0].up, found[1].up)


def test_what_cannot_be_is_refused() -> None:
    matrix = signal()
    with pytest.raises(InvalidRank):
        quantised_low_rank(matrix, 129, FORM)
    for wrong in (
        {"order": "qlora"},
        {"iterations": 0},
        {"weights": normal(2, 2).abs()},
        {"weights": -matrix.abs()},
    ):
        with pytest.raises(InvalidOption):
            quantised_low_rank(matrix, 1, FORM, **wrong)  # type: ignore[arg-type]
