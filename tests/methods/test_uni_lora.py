"""Uni-LoRA: one vector for all factors of a model."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from methods._layers import adapted, count, disturbed, expression_of, linear, normal
from methods._peft import DTYPES, HOSTS, assert_parity, twins
from peft import UniLoraConfig
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.weights import Pooled


def theta_of(model: Any) -> nn.Parameter:
    found: nn.Parameter = model.rankfold_default_theta
    return found


def factors(model: nn.Module, path: str = "0") -> dict[str, Pooled]:
    return {leaf.name: leaf for leaf in expression_of(model, path).leaves() if isinstance(leaf, Pooled)}


def no_leaves(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    return ()


def deal_alike(ours: Any, theirs: Any) -> None:
    """Give peft our indices and coefficients: the two shuffle by different generators."""
    pooled = {leaf.name: leaf for leaf in ours.expression.leaves() if isinstance(leaf, Pooled)}
    for name, letter in (("down", "A"), ("up", "B")):
        getattr(theirs, f"unilora_indices_{letter}")["default"] = pooled[name].index
        getattr(theirs, f"unilora_scales_{letter}")["default"] = pooled[name].coefficient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", ["perceptron", "transposed", "llama"])
def test_outputs_and_gradients_are_pefts(host: str, dtype: torch.dtype) -> None:
    config = UniLoraConfig(r=3, theta_d_length=50, fan_in_fan_out=host == "transposed")
    pair = twins(
        HOSTS[host], dtype, "uni-lora", config, no_leaves, rank=3, length=50, prepare=deal_alike,
        shared=lambda ours, theirs: [(theta_of(ours), theirs.base_model.unilora_theta_d["default"])],
    )  # fmt: skip
    assert_parity(pair)


def deep(layers: int = 3) -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).double()


def projection(model: nn.Module, layers: int) -> Tensor:
    """Return P, (all entries of all factors, length)."""
    leaves = [leaf for i in range(layers) for leaf in factors(model, str(i)).values()]
    index = torch.cat([leaf.index.flatten() for leaf in leaves])
    coefficient = torch.cat([leaf.coefficient.flatten() for leaf in leaves])
    matrix = torch.zeros(len(index), len(theta_of(model)), dtype=torch.float64)
    matrix[torch.arange(len(index)), index] = coefficient
    return matrix


@pytest.mark.parametrize("length", [1, 7, 20])
def test_the_map_from_the_vector_to_all_factors_is_an_isometry(length: int) -> None:
    model = rf.adapt(deep(), "uni-lora", rank=3, length=length)
    matrix = projection(model, 3)
    assert (matrix.T @ matrix - torch.eye(length)).abs().max() < 1e-14
    values = torch.cat(
        [leaf.tensor().flatten() for i in range(3) for leaf in factors(model, str(i)).values()]
    )
    torch.testing.assert_close(values, matrix @ theta_of(model))
    torch.testing.assert_close(values.norm(), theta_of(model).norm())


def test_every_index_is_used_equally_often_up_to_one() -> None:
    used = (projection(rf.adapt(deep(), "uni-lora", rank=3, length=20), 3) != 0).sum(0)
    assert used.sum() == 3 * 3 * 16
    assert used.max() - used.min() <= 1


@pytest.mark.parametrize(("layers", "rank"), [(1, 2), (3, 2), (3, 5)])
def test_the_trained_count_depends_on_neither_depth_nor_rank(layers: int, rank: int) -> None:
    assert count(rf.adapt(deep(layers), "uni-lora", rank=rank, length=20)) == 20


def test_entries_that_share_an_index_stay_equal_up_to_their_coefficients() -> None:
    model = disturbed(rf.adapt(deep(), "uni-lora", rank=3, length=8))  # 144 entries: every index 18 times
    flat = [leaf for i in range(3) for leaf in factors(model, str(i)).values()]
    values = torch.cat([leaf.tensor().flatten() for leaf in flat])
    index = torch.cat([leaf.index.flatten() for leaf in flat])
    for j in range(8):
        assert len(values[index == j].unique()) == 1


def test_the_gradient_of_the_vector_is_that_of_the_factors_through_the_transposed_map() -> None:
    model = disturbed(adapted("uni-lora", rank=3, length=10))
    tensors = {name: leaf.tensor().detach().requires_grad_() for name, leaf in factors(model).items()}
    weights, x = normal(5, 6, seed=3), normal(5, 8)
    (x @ tensors["down"].T @ tensors["up"].T * weights).sum().backward()
    (model(x) * weights).sum().backward()
    expected = torch.zeros(10, dtype=torch.float64)
    for name, leaf in factors(model).items():
        expected.index_add_(0, leaf.index.flatten(), (tensors[name].grad * leaf.coefficient).flatten())
    torch.testing.assert_close(theta_of(model).grad, expected)


def test_the_start_is_near_the_base_and_not_on_it() -> None:
    model, x = adapted("uni-lora", linear(20, 30), rank=4), normal(5, 30)
    assert theta_of(model).abs().max() <= 0.02
    assert 0 < (model(x) - linear(20, 30)(x)).abs().max() < 0.02


def test_a_vector_longer_than_all_factors_is_cut_to_them() -> None:
    assert count(adapted("uni-lora", rank=3, length=1000)) == 3 * (6 + 8)


def test_the_seed_alone_deals_the_indices() -> None:
    first, again, other = (
        factors(adapted("uni-lora", rank=3, length=10, seed=seed))["up"].index for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"length": 0}, {"bound": 0.0}, {"bound": -0.1}])
def test_a_start_at_the_saddle_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        adapted("uni-lora", rank=2, **options)
