"""Incremental principal components against the decomposition of all rows at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold.errors import InvalidOption
from rankfold.statistics import PrincipalComponents, collect


def drawn(seed: int, sizes: list[int], width: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.linspace(3, 0.5, width), 4 * torch.randn(width, generator=generator)
    return [(torch.randn(n, width, generator=generator) * scale + shift).double() for n in sizes]


def pca(batches: list[Tensor], **options: Any) -> PrincipalComponents:
    model = nn.Sequential(nn.Linear(batches[0].shape[-1], 2)).double()
    found: PrincipalComponents = collect(model, batches, [("input_pca", options)])["0"].get("input_pca")
    return found


@given(st.integers(0, 1000), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_with_all_components_it_is_the_decomposition_of_all_centred_rows(seed: int, sizes: list[int]) -> None:
    batches = drawn(seed, sizes)
    found, rows = pca(batches, components=5), torch.cat(batches)
    centred = rows - rows.mean(0)
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.variance, centred.square().mean(0), atol=1e-10, rtol=1e-7)
    spread = found.components.T @ (found.values[:, None] ** 2 * found.components)
    torch.testing.assert_close(spread, centred.T @ centred, atol=1e-9, rtol=1e-7)
    assert found.count == len(rows)
    assert found.values.tolist() == sorted(found.values.tolist(), reverse=True)


def test_leading_components_are_found_although_the_mean_is_far_from_zero() -> None:
    batches = drawn(0, [40] * 10, width=12)
    found, rows = pca(batches, components=4), torch.cat(batches)
    _, values, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert float((found.components[0] @ right[0]).abs()) > 0.99
    torch.testing.assert_close(found.values[0], values[0], rtol=0.01, atol=0)
    uncentred = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    assert float((found.components[0] @ uncentred).abs()) < 0.9
    torch.testing.assert_close(
        found.components @ found.components.T, torch.eye(4).double(), atol=1e-10, rtol=0
    )
    assert bool((found.components.gather(1, found.components.abs().argmax(1)[:, None]) > 0).all())


def test_the_shares_of_explained_variance_add_up_to_one() -> None:
    assert float(pca(drawn(1, [7, 8]), components=5).explained.sum()) == pytest.approx(1)
    assert float(pca(drawn(1, [7, 8]), components=2).explained.sum()) < 1
    assert not pca([torch.ones(3, 5).double()], components=2).explained.any()


def test_components_converge_on_like_batches_and_not_on_unlike_ones() -> None:
    alike = drawn(0, [400])[0]
    assert pca([alike, alike, alike], components=3).converged
    assert not pca([alike], components=3).converged
    turned = torch.roll(alike, 2, dims=1) * 5
    assert not pca([alike, turned], components=3).converged
    assert pca([alike, turned], components=3, tolerance=1e-9).converged


def test_batches_with_fewer_tokens_than_components_are_not_lost() -> None:
    found = pca(drawn(3, [1, 1, 2, 1, 1]), components=4)
    assert found.count == 6
    assert found.components.shape == (4, 5)


def test_a_randomised_decomposition_finds_the_same_leading_directions() -> None:
    batches = drawn(0, [60, 60, 60], width=40)
    exact = pca(batches, components=3, iterations=None)
    for iterations, tolerance in ((4, 2e-3), (12, 2e-5)):
        fast = pca(batches, components=3, iterations=iterations)
        torch.testing.assert_close(fast.values, exact.values, rtol=tolerance, atol=0)
        assert bool(((fast.components * exact.components).sum(1) > 1 - 100 * tolerance).all())
        assert not fast.values.equal(exact.values)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "needs components"),
        ({"components": 0}, "components must be"),
        ({"components": True}, "components must be"),
        ({"components": 2, "tolerance": 0.0}, "tolerance must be"),
        ({"components": 2, "iterations": -1}, "iterations must be"),
        ({"components": 2, "rho": 2}, "has no option 'rho'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        pca(drawn(0, [3]), **options)
