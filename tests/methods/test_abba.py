"""ABBA: the entrywise product of two trained low-rank matrices."""

from collections.abc import Iterable, Mapping
from typing import Any

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
    rank_of,
)  # fmt: skip
from methods._peft import DTYPES, HOSTS, assert_parity, twins
from peft import LoHaConfig
from torch import Tensor


def layout(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    for name, theirs in (("up1", "w1_a"), ("down1", "w1_b"), ("up", "w2_a"), ("down", "w2_b")):
        yield name, getattr(layer, f"hada_{theirs}")["default"], torch.Tensor.clone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", ["perceptron", "llama"])
def test_outputs_and_gradients_are_those_of_lohas_product(host: str, dtype: torch.dtype) -> None:
    # LoHa is the same map with another start; its scaling is alpha / r, ours is alpha.
    assert_parity(twins(HOSTS[host], dtype, "abba", LoHaConfig(r=2, alpha=6), layout, rank=2, alpha=3))


@pytest.mark.parametrize("tokens", [1, 500])
def test_the_output_is_that_of_the_entrywise_product(tokens: int) -> None:
    # Few tokens go through the Khatri-Rao factors, many through the matrix.
    model, x = disturbed(adapted("abba", linear(20, 24), rank=3, alpha=2.0)), normal(tokens, 24)
    leaves = {name: leaf.detach() for name, leaf in leaves_of(model).items()}
    product = (leaves["up1"] @ leaves["down1"]) * (leaves["up"] @ leaves["down"])
    torch.testing.assert_close(model(x), x @ (base(model) + 2 * product).T + model[0].bias)


def test_the_rank_is_the_square() -> None:
    assert rank_of(change(disturbed(adapted("abba", linear(20, 24), rank=3)))) == 9


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_at_the_start_only_the_second_up_factor_has_a_gradient(alpha: float | None) -> None:
    model, x = adapted("abba", rank=2, alpha=alpha), normal(5, 8)
    assert torch.equal(model(x), linear()(x))
    dense, leaves = backward(model, x), leaves_of(model)
    scaling = 2 if alpha is None else alpha  # alpha itself; the rank by default
    first = leaves["up1"] @ leaves["down1"]
    torch.testing.assert_close(leaves["up"].grad, scaling * (dense * first) @ leaves["down"].T)
    assert all(not leaves[name].grad.any() for name in ("up1", "down1", "down"))


def test_the_first_pair_starts_at_the_leading_subspace_and_nothing_is_subtracted() -> None:
    model = adapted("abba", rank=2)
    leaves, matrix = leaves_of(model), base(model)
    torch.testing.assert_close(
        (matrix - leaves["up1"] @ leaves["down1"]).norm(), torch.linalg.svdvals(matrix)[2:].norm()
    )
    torch.testing.assert_close(leaves["up1"].T @ leaves["up1"], leaves["down1"] @ leaves["down1"].T)
    assert not leaves["up"].any()
    assert 0.8 < leaves["down"].abs().max() / (6 / 8) ** 0.5 <= 1


def test_it_costs_two_loras() -> None:
    assert count(adapted("abba", rank=2)) == 4 * (6 + 8)
