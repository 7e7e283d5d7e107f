"""MiLoRA: the smallest singular triplets train."""

from pathlib import Path

import pytest
import torch
from methods._calibrated import assert_finite, assert_reloads
from methods._layers import adapted, backward, base, change, disturbed, leaves_of, linear, normal, rank_of


@pytest.mark.parametrize("alpha", [3, 12])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_the_scaled_product_is_made_of_the_smallest_triplets_for_any_alpha(
    shape: tuple[int, int], alpha: float
) -> None:
    model = adapted("lora/milora", linear(*shape), rank=3, alpha=alpha)
    leaves, matrix = leaves_of(model), base(model)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    product = alpha / 3 * leaves["up"] @ leaves["down"]
    torch.testing.assert_close(product, left[:, 3:] * values[3:] @ right[3:])


def test_the_factors_are_balanced_and_orthogonal_to_the_leading_triplets() -> None:
    model = adapted("lora/milora", rank=3, alpha=12)
    up, down = leaves_of(model)["up"], leaves_of(model)["down"]
    torch.testing.assert_close(up.T @ up, down @ down.T)
    left, _, right = torch.linalg.svd(base(model), full_matrices=False)
    assert (left[:, :3].T @ up).abs().max() < 1e-12
    assert (right[:3] @ down.T).abs().max() < 1e-12


@pytest.mark.parametrize("structure", ["lora", "dora", "gralora"])
@pytest.mark.parametrize("alpha", [4, 12])
def test_the_start_is_the_bases_output(structure: str, alpha: float) -> None:
    x = normal(5, 8)
    torch.testing.assert_close(adapted(f"{structure}/milora", rank=2, alpha=alpha)(x), linear()(x))


def test_as_a_frame_it_is_orthonormal_on_both_sides() -> None:
    leaves = leaves_of(adapted("svfit/milora", rank=3))
    for side in (leaves["left"].T @ leaves["left"], leaves["right"] @ leaves["right"].T):
        torch.testing.assert_close(side, torch.eye(3, dtype=torch.float64))


def test_a_core_between_its_bases_leaves_the_leading_triplets_alone() -> None:
    model = disturbed(adapted("lora-xs/milora", rank=3), 10)
    left, _, right = torch.linalg.svd(base(model), full_matrices=False)
    moved = change(model)
    assert rank_of(moved) == 3
    assert (left[:, :3].T @ moved).abs().max() < 1e-12
    assert (moved @ right[:3].T).abs().max() < 1e-12


@pytest.mark.parametrize("rank", [None, 2, 0])
def test_a_weight_of_any_rank_starts_at_its_base(rank: int | None) -> None:
    x = normal(5, 8)
    model = adapted("lora/milora", linear(rank=rank), rank=3)
    torch.testing.assert_close(model(x), linear(rank=rank)(x))
    backward(model, x)
    assert_finite(model)


def test_the_adapter_loads_and_the_start_is_the_same_every_time(tmp_path: str) -> None:
    first, second = (leaves_of(adapted("lora/milora", rank=2, seed=seed)) for seed in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_reloads(adapted("lora/milora", rank=2), linear(), normal(5, 8), Path(tmp_path))
