"""TLoRA: a transform of full rank and a ring."""

import pytest
import torch
from methods._layers import adapted, base, change, count, disturbed, expression_of, leaves_of, linear, rank_of
from torch import nn

import rankfold as rf
from rankfold.errors import InvalidOption


def tlora(rank: int = 2, bond: int = 2, host: nn.Module | None = None) -> nn.Module:
    return adapted(rf.Recipe(("tlora", {"bond": bond})), host or linear(12, 60), rank=rank)


def test_the_weight_is_the_transformed_base_plus_the_trace_of_the_ring() -> None:
    model = disturbed(tlora(rank=3))
    own = {name: value.detach() for name, value in leaves_of(model).items()}
    transform = sum(torch.kron(own[f"U{c}"], own[f"V{c}"]) for c in (0, 1))
    last = own["D4"].view(3, 3, 10)  # (outer bond, inner bond, mode)
    first = own["D1"].view(3, 3, 3).transpose(0, 1)  # (outer bond, mode, inner bond)
    ring = torch.einsum("aoc,cpd,die,aej->opij", first, own["D2"], own["D3"], last)
    torch.testing.assert_close(
        expression_of(model).dense().detach(), base(model) @ transform + ring.reshape(12, 60)
    )


def test_the_transform_is_of_full_rank_at_a_fraction_of_the_numbers() -> None:
    model = disturbed(tlora())
    transform = expression_of(model).terms[0].factors[1]  # type: ignore[union-attr,index]
    assert rank_of(transform.dense().detach()) == 60  # type: ignore[union-attr,operator]
    assert sum(p.numel() for p in transform.parameters()) == 2 * (36 + 100)  # type: ignore[union-attr]


def test_the_residual_has_at_most_the_square_of_its_bond_as_rank() -> None:
    model = disturbed(tlora())
    for name in ("U1", "V1"):
        leaves_of(model)[name].data.zero_()
    for name in ("U0", "V0"):
        leaves_of(model)[name].data.copy_(torch.eye(len(leaves_of(model)[name])))
    assert rank_of(change(model)) == 4
    assert count(model) == 2 * (36 + 100) + 4 * (3 + 4 + 6 + 10)


def test_the_start_is_the_base_and_both_parts_get_gradients() -> None:
    model, x = tlora(), torch.randn(5, 60, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(model(x), linear(12, 60)(x))
    model(x).square().sum().backward()
    moving = {name for name, leaf in leaves_of(model).items() if leaf.grad.abs().max() > 1e-9}
    assert moving == {"U0", "V0", "V1", "D4"}


def test_a_bond_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidOption, match="bond"):
        tlora(bond=0)
