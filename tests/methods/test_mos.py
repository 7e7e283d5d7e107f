"""MoS: factors put together from shards of shared pools."""

from typing import Any

import pytest
import torch
from methods._layers import count, disturbed, expression_of, normal, rank_of
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.weights import Pooled


def mos(layers: int = 4, rank: int = 6, seed: int = 0, **options: Any) -> nn.Module:
    model = nn.Sequential(*(nn.ModuleDict({"proj": nn.Linear(12, 8)}) for _ in range(layers))).double()
    return disturbed(rf.adapt(model, rf.Recipe(("mos", options)), rank=rank, seed=seed))


def leaf(model: nn.Module, layer: int, end: str) -> Pooled:
    leaves = expression_of(model, f"{layer}.proj").leaves()
    return next(each for each in leaves if isinstance(each, Pooled) and each.name == end)


def pool(model: Any, end: str) -> Tensor:
    found: Tensor = getattr(model, f"rankfold_default_{end}0")
    return found


def test_a_row_is_its_shards_one_after_another() -> None:
    model = mos()
    for end, size in (("down", 12), ("up", 8)):
        read = leaf(model, 1, end)
        rows = [torch.cat([pool(model, end)[i] for i in row]) for row in read.index.tolist()]
        assert torch.equal(read.tensor(), torch.stack(rows))
        assert read.tensor().shape == (6, size)


@pytest.mark.parametrize("rank", [2, 6, 8])
def test_the_count_follows_the_budget_and_the_rank_of_a_layer_may_be_larger(rank: int) -> None:
    model = mos(layers=8, rank=rank)
    assert count(model) == 2 * 8 * (12 + 8)
    changed = expression_of(model, "0.proj").dense() - model[0]["proj"].matrix()  # type: ignore[index]
    assert rank_of(changed.detach()) == rank


def test_public_shards_are_distinct_in_a_layer_and_private_ones_read_by_one_layer_only() -> None:
    model = mos()
    public = (2 - 1) * 4 * 4
    indices = [leaf(model, k, "down").index.flatten() for k in range(4)]
    for k, index in enumerate(indices):
        private = index[index >= public]
        assert private.tolist() == list(range(public + k * 4, public + (k + 1) * 4))
        shared = index[index < public]
        assert len(shared) == 20  # more than the 16 there are: four come twice
        assert len(shared[:16].unique()) == 16
    assert not torch.equal(indices[0], indices[1])
    assert not torch.equal(indices[0], leaf(model, 0, "up").index.flatten())


def test_a_private_shard_gets_its_gradient_from_its_layer_alone() -> None:
    model = mos()
    model[2]["proj"](normal(5, 12)).square().sum().backward()  # type: ignore[index]
    touched = pool(model, "down").grad.abs().sum(1) > 0
    assert touched[16:].nonzero().flatten().tolist() == list(range(8, 12))


def test_the_pools_start_like_loras_factors_with_the_fan_in_of_a_whole_row() -> None:
    model = nn.Sequential(*(nn.ModuleDict({"proj": nn.Linear(400, 100)}) for _ in range(3))).double()
    rf.adapt(model, "mos", rank=8)
    assert pool(model, "down").shape == (2 * 3 * 4, 100)
    assert 0.99 / 20 < pool(model, "down").abs().max() <= 1 / 20
    assert not pool(model, "up").any()
    x = normal(5, 400)
    assert torch.equal(model[1]["proj"](x), nn.functional.linear(x, *model[1]["proj"].parameters()))  # type: ignore[index,operator]


def test_a_public_shard_gets_the_sum_of_what_reaches_it_through_all_layers_and_places() -> None:
    model, x = mos(), normal(5, 12)
    expected = torch.zeros_like(pool(model, "down"))
    for k in range(4):
        read = leaf(model, k, "down")
        value = read.tensor().detach().requires_grad_()
        up = leaf(model, k, "up").tensor().detach()
        (x @ value.T @ up).square().sum().backward()
        expected.index_add_(0, read.index.flatten(), value.grad.view(-1, 3))  # type: ignore[union-attr]
        y = model[k]["proj"](x) - nn.functional.linear(x, *model[k]["proj"].parameters())  # type: ignore[index,operator]
        y.square().sum().backward()
    torch.testing.assert_close(pool(model, "down").grad, expected)


def test_all_private_is_a_pair_of_factors_per_layer() -> None:
    model = mos(rank=2, budget=2, private=2, shards=1)
    assert leaf(model, 3, "down").index.flatten().tolist() == [6, 7]
    assert count(model) == 4 * 2 * (12 + 8)


def test_the_seed_alone_deals_the_shards() -> None:
    first, again, other = (leaf(mos(seed=seed), 0, "up").index for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"private": 3}, {"shards": 0}, {"budget": 2, "private": 2}])
def test_impossible_divisions_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidOption, match="mos"):
        mos(**options)
