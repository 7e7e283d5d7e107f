"""LoRA-XS: a small core between frozen singular bases."""

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    count,
    disturbed,
    leaves_of,
    linear,
    normal,
    sgd_step,
)  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 8), (20, 30), (30, 20)])
def test_the_trained_count_does_not_depend_on_the_layer(shape: tuple[int, int]) -> None:
    assert count(adapted("lora-xs", linear(*shape), rank=4)) == 16


def test_the_change_stays_between_the_leading_singular_bases() -> None:
    model = disturbed(adapted("lora-xs", rank=3), 10)
    left, _, right = torch.linalg.svd(base(model), full_matrices=False)
    moved = change(model)
    inside = left[:, :3] @ left[:, :3].T @ moved @ right[:3].T @ right[:3]
    torch.testing.assert_close(inside, moved)


@pytest.mark.parametrize("alpha", [None, 6])
def test_a_step_moves_the_weight_by_the_projected_gradient_with_the_singular_values_on_the_input_side(
    alpha: float | None,
) -> None:
    model = adapted("lora-xs", rank=3, alpha=alpha)
    start, scaling = change(model), 1 if alpha is None else 2
    left, values, right = (
        t[..., :3] if i == 0 else t[:3] for i, t in enumerate(torch.linalg.svd(base(model)))
    )
    dense = backward(model, normal(5, 8))
    sgd_step(model, 0.1)
    core = left.T @ dense @ right.T * values
    expected = -0.1 * scaling**2 * left @ core @ (values[:, None] * right)
    torch.testing.assert_close(change(model) - start, expected)


def test_the_core_starts_at_its_deviation_so_the_start_is_near_the_base_and_not_on_it() -> None:
    model = adapted("lora-xs", linear(40, 40), rank=30)
    assert leaves_of(model)["core"].std().item() == pytest.approx(1e-5, rel=0.1)
    x = normal(5, 40)
    difference = (model(x) - linear(40, 40)(x)).abs().max()
    assert 0 < difference < 1e-4


def test_the_bases_are_saved_with_the_adapter_for_they_are_not_unique() -> None:
    leaves = leaves_of(adapted("lora-xs", rank=3))
    assert sorted(leaves) == ["core", "left", "right"]
    assert [name for name, leaf in leaves.items() if leaf.requires_grad] == ["core"]
