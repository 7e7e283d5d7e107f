"""RandLoRA, NOLA and frozen A: random matrices that stay, and what trains around them."""

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
    expression_of,
    leaves_of,
    linear,
    normal,
    rank_of,
    sgd_step,
)  # fmt: skip
from methods._peft import DTYPES, Host, assert_parity, twins
from peft import RandLoraConfig
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.weights import RandomMixture


def bases(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.rpartition("_")[2]: t
        for name, t in model.named_buffers()
        if name.startswith("rankfold_default_")
    }


def layout(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    yield "inner", layer.randlora_lambda["default"], Tensor.t
    yield "outer", layer.randlora_gamma["default"], torch.Tensor.clone


def pools(ours: nn.Module, theirs: Any) -> Iterable[tuple[Tensor, Tensor]]:
    # peft numbers the columns of B term by term and the rows of A rank by rank.
    up, theirs_up = bases(ours)["up"], theirs.base_model.randlora_B["default"]
    theirs_up.data.copy_(up.transpose(1, 2).reshape(up.shape))
    theirs.base_model.randlora_A["default"].data.copy_(bases(ours)["down"][:, None])
    return []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", [(6, 10), (10, 6)])
def test_outputs_and_gradients_are_pefts(dtype: torch.dtype, sides: tuple[int, int]) -> None:
    host = Host(
        lambda: nn.Sequential(nn.Linear(*sides)), ("0",), lambda g: torch.randn(5, sides[0], generator=g)
    )
    config = RandLoraConfig(r=4, randlora_alpha=80)
    assert_parity(twins(host, dtype, "randlora", config, layout, shared=pools, rank=4))


@pytest.mark.parametrize(("out", "columns"), [(12, 20), (20, 12)])
def test_the_sum_has_full_rank_unless_its_terms_share_one_outer_diagonal(out: int, columns: int) -> None:
    model = disturbed(adapted("randlora", linear(out, columns), rank=5))
    assert rank_of(change(model)) == 12
    assert count(model) == 3 * (5 + 12)
    outer = leaves_of(model)["outer"]
    outer.data = outer.data[:1].expand_as(outer).clone()
    assert rank_of(change(model)) == 5


def test_only_the_inner_diagonals_have_a_gradient_at_the_start() -> None:
    model, x = adapted("randlora", rank=2), normal(5, 8)
    assert torch.equal(model(x), linear()(x))
    backward(model, x)
    assert leaves_of(model)["inner"].grad.any()
    assert not leaves_of(model)["outer"].grad.any()


def test_the_outer_diagonals_start_at_one_over_their_longer_side_and_the_bases_have_deviation_one() -> None:
    model = adapted("randlora", linear(30, 40), rank=4)
    outer = leaves_of(model)["outer"].detach()
    torch.testing.assert_close(outer, torch.full((8, 30), 1 / 30, dtype=torch.float64))
    assert all(found.std().item() == pytest.approx(1) for found in bases(model).values())


def test_layers_share_the_bases_cut_to_their_sides() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6)).double()
    rf.adapt(model, "randlora", rank=4)
    assert {name: t.shape for name, t in bases(model).items()} == {"down": (4, 8), "up": (12, 2, 4)}
    for path in ("0", "1"):
        disturbed(model)
        large, small = max(base(model, path).shape), min(base(model, path).shape)
        up, down = bases(model)["up"][:large, : -(-small // 4)], bases(model)["down"][:, :small]
        inner, outer = (leaves_of(model, path)[name].detach() for name in ("inner", "outer"))
        expected = 20 * torch.einsum("Mnk,nk,km,nm->Mm", up, inner, down, outer)
        moved = change(model, path)
        torch.testing.assert_close(moved, expected if moved.shape[0] == large else expected.T)


def test_sparse_bases_have_one_entry_in_three() -> None:
    found = bases(adapted("randlora", linear(60, 60), rank=4, sparse=3))["up"]
    assert (found != 0).double().mean().item() == pytest.approx(1 / 3, abs=0.05)
    assert found.std().item() == pytest.approx(1)


def test_bases_so_sparse_that_one_is_zero_are_refused() -> None:
    with pytest.raises(InvalidOption, match="at 0, sparse=100000 leaves a basis of 4 x 60 with zeros only"):
        adapted("randlora", linear(60, 60), rank=4, sparse=100000)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(2, 64))
    with pytest.raises(InvalidOption, match="at 1, sparse=20 leaves a basis of 2 x 2 with zeros only"):
        rf.adapt(model, "randlora", rank=2, sparse=20)  # though none of the whole bases is zero
    assert adapted("randlora", linear(400, 400), rank=4, sparse=20) is not None  # sqrt(m)


@pytest.mark.parametrize("rank", [1, 4])
def test_nolas_numbers_do_not_depend_on_the_rank_or_the_weight(rank: int) -> None:
    model = disturbed(adapted("nola", linear(6 * rank, 9), rank=rank, count=5))
    assert count(model) == 10
    assert rank_of(change(model)) == rank


def test_nola_starts_with_zero_coefficients_of_which_those_of_the_up_factor_alone_have_a_gradient() -> None:
    model, x = adapted("nola", linear(30, 40), rank=8, count=50), normal(5, 40)
    assert torch.equal(model(x), linear(30, 40)(x))
    backward(model, x)
    up, down = (leaves_of(model)[f"{end}.coefficients"] for end in ("up", "down"))
    assert not up.any()
    assert not down.any()
    assert up.grad.any()
    assert not down.grad.any()


@pytest.mark.parametrize("end", ["up", "down"])
def test_nolas_random_matrices_are_uniform_by_their_number_and_the_fixed_one_by_the_fan_in(end: str) -> None:
    model = adapted("nola", linear(300, 400), rank=8, count=25)
    leaf = next(m for m in expression_of(model).modules() if isinstance(m, RandomMixture) and m.name == end)
    fixed = leaf.tensor().detach().clone()
    if end == "up":
        assert not fixed.any()
    else:
        assert 0.99 / 400**0.5 < fixed.abs().max() <= 1 / 400**0.5
    leaves_of(model)[f"{end}.coefficients"].data[3] = 1
    one = leaf.tensor().detach() - fixed
    assert 0.99 / 5 < one.abs().max() <= 1 / 5
    assert one.std().item() == pytest.approx(1 / 5 / 3**0.5, rel=0.05)


def test_nolas_gradient_is_that_of_the_mixture_and_the_global_generator_stays() -> None:
    model, x = disturbed(adapted("nola", rank=2, count=5)), normal(5, 8)
    before = torch.get_rng_state()
    dense = backward(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    for end in ("up", "down"):
        coefficients = leaves_of(model)[f"{end}.coefficients"]
        for i in range(5):  # the change is linear in these
            saved = coefficients.data.clone()
            coefficients.data[i] += 1
            more = change(model)
            coefficients.data = saved
            torch.testing.assert_close(coefficients.grad[i], (dense * (more - change(model))).sum())


def test_frozen_a_is_projected_fine_tuning() -> None:
    model = adapted("lora-frozen-a", rank=3)
    down = leaves_of(model)["down"].clone()
    torch.testing.assert_close(down @ down.T, torch.eye(3, dtype=torch.float64))
    dense = backward(model, normal(5, 8))
    sgd_step(model, 0.1)
    torch.testing.assert_close(change(model), -0.1 * 4 * dense @ down.T @ down)
    assert count(model) == 3 * 6
    assert torch.equal(leaves_of(model)["down"], down)
    assert not down.requires_grad
    assert base(model).shape == (6, 8)
