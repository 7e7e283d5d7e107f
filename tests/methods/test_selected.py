"""Sparse methods really skip: what they keep, counted beside training the same weights whole."""

from typing import Any

import pytest
import torch
from methods._layers import normal
from methods._moving import Training, perceptron
from torch import Tensor, nn

import rankfold as rf
from rankfold.methods.selected import selections
from rankfold.weights import Selection

POINTS = {
    "lift": {"refresh": 2, "filter_rank": 1},
    "losia": {"factor": 0.5, "interval": 2},
    "losia-pro": {"factor": 0.5, "interval": 2},
    "sara-diffusion": {"share": 0.25},
}
WEIGHTS = 10 * 12 + 6 * 10  # numbers in the two adapted weights
TOKENS = 24


def training(name: str, **options: Any) -> Training:
    rank = 2 if name == "lift" else None
    return Training(rf.Recipe((name, {**POINTS[name], **options})), rank=rank, total=12)


def selected(trained: Training) -> list[Selection]:
    return list(selections(trained.started).values())


def optimizer_numbers(trained: Training) -> int:
    """Numbers in the gradients and in everything that the optimizer keeps in a parameter's shape."""
    found = 0
    for selection in selected(trained):
        parameter = selection.values.value
        assert parameter.grad is not None
        found += parameter.grad.numel()
        found += sum(v.numel() for v in trained.optimizer.state[parameter].values() if v.dim())
    return found


@pytest.mark.parametrize("name", POINTS)
def test_gradient_and_moments_are_as_large_as_the_selection(name: str) -> None:
    trained = training(name)
    trained.run(3)
    count = sum(selection.values.value.numel() for selection in selected(trained))
    wanted = {"lift": 44 + 32, "losia": 30 + 15, "losia-pro": 30 + 15, "sara-diffusion": 30 + 15}
    assert count == wanted[name] < WEIGHTS / 2
    assert optimizer_numbers(trained) == 3 * count  # a dense Adam has 3 * WEIGHTS


def saved_numbers(model: nn.Module, x: Tensor) -> int:
    """Numbers kept for backward beside parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(x)
    del kept
    return sum(found.values())


def linears() -> nn.Module:
    """Return two layers between which nothing is kept but what the second one needs."""
    return nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 6)).double()


@pytest.mark.parametrize("name", POINTS)
def test_no_more_is_kept_for_backward_than_by_training_the_weights_whole(name: str) -> None:
    x = normal(TOKENS, 12)
    dense = saved_numbers(linears(), x)
    assert dense == TOKENS * (12 + 10)
    rank = 2 if name == "lift" else None
    model = rf.adapt(linears(), rf.Recipe((name, POINTS[name])), rank=rank, targets="all-linear")
    fewer = {"losia-pro": TOKENS * (6 + 5)}  # half of the columns of 12 and of 10
    assert saved_numbers(model, x) == fewer.get(name, dense)


@pytest.mark.parametrize("name", POINTS)
def test_a_weight_that_left_the_selection_comes_back_with_what_it_had_learnt(name: str) -> None:
    trained = training(name)
    start = [selection.positions().clone() for selection in selected(trained)]
    trained.run(9)
    for selection, positions in zip(selected(trained), start, strict=True):
        before = selection.dense().detach()
        support = [leaf.tensor().clone() for leaf in selection.support]
        if len(support) == 1:
            selection.select(positions)
            selection.select(*support)
        assert torch.equal(selection.dense(), before)
        both = torch.cat([selection.positions(), selection.kept_index.value])
        assert len(both.unique()) == len(both)


def test_the_base_is_never_edited() -> None:
    for name in POINTS:
        trained = training(name)
        trained.run(8)
        rf.remove(trained.model)
        for key, value in perceptron().state_dict().items():
            assert torch.equal(trained.model.state_dict()[key], value)
