"""ResLoRA: layers apply the changes of the layers before them."""

from typing import Any

import pytest
import torch
from methods._layers import change, count, disturbed, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption


def reslora(previous: int = 1, layers: int = 4) -> nn.Module:
    model = nn.Sequential(*(nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(layers))).double()
    return disturbed(rf.adapt(model, rf.Recipe(("reslora", {"previous": previous})), rank=2))


def pair(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    return tuple(getattr(model, f"rankfold_default_{end}{layer}") for end in ("up", "down"))  # type: ignore[return-value]


@pytest.mark.parametrize(("previous", "first"), [(0, 3), (1, 2), (2, 1), (-1, 0), (9, 0)])
def test_the_change_is_the_sum_of_the_layers_before(previous: int, first: int) -> None:
    model = reslora(previous)
    products = [up.detach() @ down.detach() for up, down in (pair(model, i) for i in range(4))]
    torch.testing.assert_close(change(model, "3.proj"), 2 * sum(products[first:]))  # type: ignore[arg-type]
    torch.testing.assert_close(change(model, "0.proj"), 2 * products[0])
    assert count(model) == 4 * 2 * (8 + 8)


def test_a_gradient_is_the_sum_over_the_layers_that_share_the_pair() -> None:
    model, x = reslora(), normal(5, 8)

    def gradient(*layers: int) -> Tensor:
        model.zero_grad()
        for i in layers:
            model[i]["proj"](x * (i + 1)).square().sum().backward()  # type: ignore[index]
        return torch.zeros(()) if pair(model, 1)[0].grad is None else pair(model, 1)[0].grad.clone()

    torch.testing.assert_close(gradient(0, 1, 2, 3), gradient(1) + gradient(2))
    assert not gradient(3).any()


def test_folding_is_exact() -> None:
    model, x = reslora(-1), normal(5, 8)
    outputs = [layer["proj"](x).detach() for layer in model]  # type: ignore[index,attr-defined]
    rf.fold(model)
    for layer, output in zip(model, outputs, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(layer["proj"](x), output)


def test_every_pair_starts_as_loras() -> None:
    model = nn.Sequential(*(nn.ModuleDict({"proj": nn.Linear(400, 8)}) for _ in range(2))).double()
    rf.adapt(model, "reslora", rank=4)
    for up, down in (pair(model, i) for i in range(2)):
        assert not up.any()
        assert 0.99 / 20 < down.abs().max() <= 1 / 20
    assert not torch.equal(pair(model, 0)[1], pair(model, 1)[1])


def test_another_shape_begins_another_chain() -> None:
    model = nn.Sequential(*(nn.ModuleDict({"proj": nn.Linear(8, n)}) for n in (8, 6, 8))).double()
    disturbed(rf.adapt(model, rf.Recipe(("reslora", {"previous": 1})), rank=2))
    (up, down), (first_up, first_down) = pair(model, 2), pair(model, 0)
    torch.testing.assert_close(change(model, "2.proj"), 2 * (up @ down + first_up @ first_down).detach())


def test_fewer_than_no_layers_are_refused() -> None:
    with pytest.raises(InvalidOption, match="previous"):
        reslora(-2)
