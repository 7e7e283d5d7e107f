"""Products of factors are decomposed and squeezed without being formed, and their moments follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linalg.matrices import normal, seeds, sizes
from torch import Tensor

from rankfold.errors import InvalidOption, InvalidRank
from rankfold.linalg import factored_svd, squeeze_factors


def product(rows: int, inner: int, columns: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return factors of inner rank at most `rank`."""
    mixer = normal(inner, rank, seed=seed + 2) @ normal(rank, inner, seed=seed + 3)
    return normal(rows, inner, seed=seed) @ mixer, normal(inner, columns, seed=seed + 1)


@given(sizes, sizes, sizes, sizes, seeds)
def test_the_triplets_are_those_of_the_product(
    rows: int, inner: int, columns: int, rank: int, seed: int
) -> None:
    up, down = product(rows, inner, columns, rank, seed)
    left, values, right = factored_svd(up, down)
    count = min(rows, inner, columns)
    scale = 1e-12 * float(up.norm() * down.norm())
    assert (left.shape, right.shape) == ((rows, count), (count, columns))
    assert torch.allclose(left.T @ left, torch.eye(count, dtype=torch.float64))
    assert torch.allclose(right @ right.T, torch.eye(count, dtype=torch.float64))
    assert torch.allclose(left * values @ right, up @ down, atol=scale)
    assert torch.allclose(values, torch.linalg.svdvals(up @ down)[:count], atol=scale)
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_batch_of_products_is_decomposed_one_by_one() -> None:
    up, down = normal(2, 3, 6, 4), normal(2, 3, 4, 5, seed=1)
    batched = factored_svd(up, down)
    squeezed = squeeze_factors(up, down, 2, 2.0, 0.5)
    for i in range(2):
        for j in range(3):
            single = factored_svd(up[i, j], down[i, j])
            assert all(torch.allclose(b[i, j], s) for b, s in zip(batched, single, strict=True))
            alone = squeeze_factors(up[i, j], down[i, j], 2, 2.0, 0.5)
            for name in ("up", "down", "up_map", "down_map", "error"):
                assert torch.allclose(getattr(squeezed, name)[i, j], getattr(alone, name))


@given(sizes, sizes, sizes, sizes, seeds, st.data())
def test_a_squeezed_product_is_the_best_of_its_rank_in_balanced_factors_with_maps_from_the_old_ones(
    rows: int, inner: int, columns: int, deficient: int, seed: int, data: st.DataObject
) -> None:
    up, down = product(rows, inner, columns, deficient, seed)
    rank = data.draw(st.integers(1, min(rows, inner, columns)))
    scale_in, scale_out = data.draw(st.floats(0.1, 10)), data.draw(st.floats(0.1, 10))
    squeezed = squeeze_factors(up, down, rank, scale_in, scale_out)
    noise = 1e-9 * float(up.norm() * down.norm() + 1) * scale_in
    rest = scale_in * up @ down - scale_out * squeezed.up @ squeezed.down
    best = torch.linalg.svdvals(scale_in * up @ down)[rank:].norm()
    assert abs(float(rest.norm() - best)) < noise
    assert abs(float(squeezed.error - best)) < noise
    assert torch.allclose(squeezed.up.T @ squeezed.up, squeezed.down @ squeezed.down.T, atol=noise)
    assert torch.allclose(up @ squeezed.up_map, squeezed.up, atol=1e-6 * float(squeezed.up.norm()))
    assert torch.allclose(squeezed.down_map @ down, squeezed.down, atol=1e-6 * float(squeezed.down.norm()))


@pytest.mark.parametrize("deficient", [False, True])
def test_a_gradient_is_carried_to_the_squeezed_factors_exactly(deficient: bool) -> None:
    up, down = product(8, 5, 7, 2 if deficient else 5, seed=4)
    gradient, scale_in, scale_out = normal(8, 7, seed=9), 2.0, 0.25
    squeezed = squeeze_factors(up, down, 3, scale_in, scale_out)
    old_up, old_down = scale_in * gradient @ down.T, scale_in * up.T @ gradient
    assert torch.allclose(squeezed.moved_up(old_up), scale_out * gradient @ squeezed.down.T)
    assert torch.allclose(squeezed.moved_down(old_down), scale_out * squeezed.up.T @ gradient)


def test_a_squeeze_does_not_depend_on_how_the_product_was_factored() -> None:
    up, down, mixer = normal(6, 4), normal(4, 5, seed=1), normal(4, 4, seed=2)
    plain = squeeze_factors(up, down, 2)
    mixed = squeeze_factors(up @ mixer, mixer.inverse() @ down, 2)
    assert torch.allclose(plain.up, mixed.up)
    assert torch.allclose(plain.down, mixed.down)


def test_a_squeeze_to_the_rank_of_the_product_loses_nothing() -> None:
    up, down = product(9, 6, 8, 3, seed=0)
    squeezed = squeeze_factors(up, down, 3)
    assert torch.allclose(squeezed.up @ squeezed.down, up @ down)
    assert float(squeezed.error) < 1e-9


def test_a_product_of_zeros_is_squeezed_to_zeros() -> None:
    squeezed = squeeze_factors(torch.zeros(4, 3), torch.randn(3, 5), 2)
    for part in (squeezed.up, squeezed.down, squeezed.up_map, squeezed.down_map):
        assert not part.any()
        assert part.isfinite().all()


def test_float32_factors_stay_float32_and_bfloat16_ones_are_raised_to_it() -> None:
    for given_dtype in (torch.float32, torch.bfloat16):
        parts = factored_svd(normal(4, 2).to(given_dtype), normal(2, 3).to(given_dtype))
        assert {part.dtype for part in parts} == {torch.float32}


def test_what_cannot_be_squeezed_is_refused() -> None:
    up, down = normal(5, 3), normal(3, 4)
    with pytest.raises(InvalidRank, match=r"rank 4 is not in 1\.\.min\(m, k, n\) = 3"):
        squeeze_factors(up, down, 4)
    with pytest.raises(InvalidOption, match="scales must be positive"):
        squeeze_factors(up, down, 2, scale_in=0.0)
    with pytest.raises(InvalidOption, match=r"\(5, 3\) and \(4, 4\) do not multiply"):
        squeeze_factors(up, normal(4, 4), 2)
    with pytest.raises(InvalidOption, match=r"the down factor of shape .* holds NaN"):
        factored_svd(up, down.log())
