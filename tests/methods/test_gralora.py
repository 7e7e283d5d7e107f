"""GraLoRA: k x k blocks with adapters of their own."""

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
from peft import GraloraConfig
from torch import Tensor

from rankfold.errors import InvalidOption


def layout(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    yield "up", layer.gralora_B["default"], lambda value: value.transpose(1, 2)
    yield "down", layer.gralora_A["default"], lambda value: value.transpose(1, 2)
    if "plain.up" in leaves:
        yield "plain.up", layer.gralora_B_general["default"].weight, torch.Tensor.clone
        yield "plain.down", layer.gralora_A_general["default"].weight, torch.Tensor.clone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hybrid_rank", [0, 3])
@pytest.mark.parametrize("host", ["perceptron", "transposed", "llama"])
def test_outputs_and_gradients_are_pefts(host: str, hybrid_rank: int, dtype: torch.dtype) -> None:
    config = GraloraConfig(
        r=4, gralora_k=2, hybrid_r=hybrid_rank, alpha=5, fan_in_fan_out=host == "transposed"
    )
    pair = twins(HOSTS[host], dtype, "gralora", config, layout, rank=4, k=2, hybrid_rank=hybrid_rank, alpha=5)
    assert_parity(pair)


def block(matrix: Tensor, row: int, column: int, k: int) -> Tensor:
    height, width = matrix.shape[0] // k, matrix.shape[1] // k
    return matrix[row * height : (row + 1) * height, column * width : (column + 1) * width]


def test_every_block_takes_its_chunks_of_both_factors() -> None:
    model = disturbed(adapted("gralora", linear(12, 18), rank=6, k=3, alpha=5.0))
    moved, (up, down) = change(model), (leaves_of(model)[name].detach() for name in ("up", "down"))
    for j in range(3):
        for n in range(3):
            expected = 5 / 6 * up[j][:, 2 * n : 2 * n + 2] @ down[n][2 * j : 2 * j + 2]
            torch.testing.assert_close(block(moved, j, n, 3), expected)
            assert rank_of(block(moved, j, n, 3)) == 2


def test_the_rank_reaches_k_times_loras_at_loras_count() -> None:
    model = disturbed(adapted("gralora", linear(36, 54), rank=6, k=3))
    assert rank_of(change(model)) == 18
    assert count(model) == count(adapted("lora", linear(36, 54), rank=6))


def test_one_block_is_lora() -> None:
    ours, lora = adapted("gralora", rank=2, k=1, alpha=3), adapted("lora", rank=2, alpha=3)
    for name in ("up", "down"):
        value = normal(*leaves_of(lora)[name].shape, seed=4)
        leaves_of(lora)[name].data, leaves_of(ours)[name].data = value, value[None].clone()
    torch.testing.assert_close(change(ours), change(lora))


def test_a_gradient_depends_on_its_own_block_only() -> None:
    model = disturbed(adapted("gralora", linear(12, 18), rank=6, k=3))
    dense = normal(12, 18, seed=5)
    elsewhere = dense.clone()
    block(elsewhere, 1, 2, 3).normal_(generator=torch.Generator().manual_seed(6))

    def gradients(at_weight: Tensor) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        (expression_of(model).dense() * at_weight).sum().backward()
        return leaves_of(model)["up"].grad, leaves_of(model)["down"].grad  # type: ignore[return-value]

    for index, (first, second) in enumerate(zip(gradients(dense), gradients(elsewhere), strict=True)):
        # Chunks of rank as blocks: B_j has one for every n, A_n one for every j.
        moved = (first - second).unflatten(2 - index, (3, 2)).abs()
        per_block = moved.sum((1, 3)) if index == 0 else moved.sum((2, 3)).T
        expected = torch.zeros(3, 3, dtype=torch.bool)
        expected[1, 2] = True
        assert torch.equal(per_block != 0, expected)


def test_the_scaling_counts_both_ranks_and_alpha_is_twice_the_rank_by_default() -> None:
    ours = disturbed(adapted("gralora", rank=4, hybrid_rank=2))
    given = disturbed(adapted("gralora", rank=4, hybrid_rank=2, alpha=8))
    torch.testing.assert_close(change(ours), change(given))
    leaves = {name: leaf.detach() for name, leaf in leaves_of(ours).items()}
    leaves_of(ours)["up"].data.zero_()
    torch.testing.assert_close(change(ours), 8 / 6 * leaves["plain.up"] @ leaves["plain.down"])


def test_a_block_starts_with_its_own_fan_in() -> None:
    down = leaves_of(adapted("gralora", linear(32, 32), rank=8, k=4))["down"]
    assert 0.9 / 8**0.5 < down.abs().max() <= 1 / 8**0.5


def test_a_residual_start_is_subtracted_in_the_hybrid_too() -> None:
    model, x = adapted("gralora/pissa", rank=4, hybrid_rank=2), normal(5, 8)
    torch.testing.assert_close(model(x), linear()(x))
    up, down = leaves_of(model)["up"], leaves_of(model)["down"]
    corner = block(base(model), 0, 1, 2)
    product = 8 / 6 * up[0][:, 2:4] @ down[1][0:2]
    torch.testing.assert_close((corner - product).norm(), torch.linalg.svdvals(corner)[2:].norm())


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 4}, {"hybrid_rank": -1}, {"hybrid_rank": 7}])
def test_impossible_cuts_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidOption, match="gralora needs"):
        adapted("gralora", rank=4, **options)
