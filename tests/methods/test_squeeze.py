"""Squeezing: trained products cut to smaller ranks through the QR decompositions of their factors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import KINDS
from methods._layers import adapted, base, change, disturbed, leaves_of, linear, normal, rank_of, trained
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidRank, NotAdapted


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def tail(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.linalg.svdvals(matrix)[rank:])


def reloaded(model: nn.Module, fresh: nn.Module, folder: Path) -> nn.Module:
    return rf.load(fresh, rf.save(model, folder / "adapter"))


def lora(point: str | rf.Recipe = "lora", rank: int = 4, **options: Any) -> nn.Module:
    return disturbed(adapted(point, rank=rank, **options))


def test_the_change_becomes_its_best_approximation_at_any_alpha() -> None:
    model = lora(alpha=10.0)
    before = change(model)
    rf.squeeze(model, 2)
    torch.testing.assert_close(change(model), best(before, 2))
    torch.testing.assert_close(torch.linalg.vector_norm(change(model) - before), tail(before, 2))
    assert leaves_of(model)["up"].shape[1] == 2


def test_the_result_does_not_depend_on_how_the_factors_are_written() -> None:
    plain, mixed = lora(), lora()
    mix = normal(4, 4, seed=3)
    leaves = leaves_of(mixed)
    leaves["up"].data = leaves["up"].data @ mix
    leaves["down"].data = torch.linalg.solve(mix, leaves["down"].data)
    torch.testing.assert_close(change(rf.squeeze(mixed, 2)), change(rf.squeeze(plain, 2)))


def test_within_dora_the_direction_is_cut_and_the_magnitude_stays() -> None:
    model = lora("dora")
    before = {name: leaf.detach().clone() for name, leaf in leaves_of(model).items()}
    rf.squeeze(model, 1)
    after = leaves_of(model)
    torch.testing.assert_close(after["up"] @ after["down"], best(before["up"] @ before["down"], 1))
    assert torch.equal(after["magnitude"], before["magnitude"])


def test_a_start_that_is_subtracted_is_part_of_the_change_that_is_cut() -> None:
    model = lora("lora/pissa")
    before = change(model)
    rf.squeeze(model, 3)
    torch.testing.assert_close(change(model), best(before, 3))
    assert sorted(leaves_of(model)) == ["down", "up"]


def test_twice_the_rank_holds_a_change_with_a_subtracted_start_exactly() -> None:
    model = lora("lora/pissa", rank=2)
    before = change(model)
    torch.testing.assert_close(change(rf.squeeze(model, 4)), before)


def gated() -> nn.Module:
    model = lora(rf.Recipe("lora", init="kaiming", ranks="adalora"), alpha=3.0)
    gate = leaves_of(model)["gate"]
    gate.data[[0, 2, 3]] = 0
    return model


def test_without_a_rank_only_terms_with_closed_gates_go_and_the_function_stays() -> None:
    model = gated()
    first, before = leaves_of(model)["gate"].shape[0], change(model)
    rf.squeeze(model)
    assert sorted(leaves_of(model)) == ["down", "up"]
    assert leaves_of(model)["up"].shape[1] == first - 3
    torch.testing.assert_close(change(model), before)


def test_gates_are_multiplied_in() -> None:
    model = gated()
    before = change(model)
    torch.testing.assert_close(change(rf.squeeze(model, 2)), best(before, 2))


def test_the_rank_rule_ends_with_a_squeeze() -> None:
    model = rf.squeeze(gated(), 2)
    optimizer = torch.optim.SGD(rf.param_groups(model, lr=0.1))
    assert rf.attach(model, optimizer).run is None


def test_without_a_rank_terms_of_which_a_factor_is_zero_go_and_others_stay_bit_for_bit() -> None:
    model = lora()
    leaves = leaves_of(model)
    leaves["up"].data[:, 1], leaves["down"].data[3] = 0, 0
    kept = leaves["up"].detach()[:, [0, 2]].clone()
    rf.squeeze(model)
    assert torch.equal(leaves_of(model)["up"], kept)


@pytest.mark.parametrize("rank", [4, 9])
def test_a_rank_that_is_not_smaller_leaves_the_factors_bit_for_bit(rank: int) -> None:
    model = lora()
    kept = {name: leaf.detach().clone() for name, leaf in leaves_of(model).items()}
    rf.squeeze(model, rank)
    assert all(torch.equal(leaf, kept[name]) for name, leaf in leaves_of(model).items())


def test_of_a_zero_product_one_term_stays_that_can_train() -> None:
    for rank in (None, 2):
        model = rf.squeeze(adapted("lora", rank=4), rank)
        assert torch.count_nonzero(change(model)) == 0
        assert leaves_of(model)["down"].shape[0] == 1
        model(normal(3, 8)).square().sum().backward()
        assert leaves_of(model)["up"].grad.abs().sum() > 0  # type: ignore[union-attr]


def test_an_untrained_change_with_a_subtracted_start_counts_as_zero() -> None:
    model = rf.squeeze(adapted("lora/pissa", rank=4), 4)
    assert torch.count_nonzero(change(model)) == 0


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize(
    "point", ["lora", "dora", "lora/pissa", "dora/pissa", "lora/adalora", "dora/pissa/adalora", "lora/relora"]
)
def test_what_is_squeezed_is_saved_and_loaded_exactly(point: str, rank: int | None, tmp_path: Path) -> None:
    model = disturbed(adapted(point, rank=4, alpha=7.0))
    leaves = leaves_of(model)
    if "gate" in leaves:
        leaves["gate"].data[1:3] = 0
    else:
        leaves["up"].data[:, 1:3] = 0
    rf.squeeze(model, rank)
    x = normal(5, 8)
    assert torch.equal(reloaded(model, linear(), tmp_path)(x), model(x))


def test_the_record_gives_the_new_ranks_and_the_old_scaling(tmp_path: Path) -> None:
    model = nn.Sequential(linear(), nn.Tanh(), linear(8, 6))
    rf.adapt(model, "lora", rank=4, alpha=8)
    rf.squeeze(disturbed(model), 2)
    again = reloaded(model, nn.Sequential(linear(), nn.Tanh(), linear(8, 6)), tmp_path)
    assert "2 (up*[" in repr(again[0][0].expression)
    assert {layer.expression.leaf("up").shape[1] for layer in (again[0][0], again[2][0])} == {2}


@pytest.mark.parametrize("host", KINDS, ids=lambda host: host.name)
def test_every_kind_of_layer_can_be_squeezed(host: Any) -> None:
    model = rf.adapt(host.model(), "lora", rank=3, targets=host.path)
    disturbed(model)
    x, before = host.input(), model(host.input())
    torch.testing.assert_close(rf.squeeze(copy.deepcopy(model), 3)(x), before)
    assert not torch.allclose(rf.squeeze(model, 1)(x), before)


def test_training_goes_on_at_the_new_rank_and_removal_gives_the_base_back() -> None:
    model = rf.squeeze(lora(), 2)
    stored = base(model).clone()
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-2))
    x, target = normal(16, 8), normal(16, 6, seed=2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert rank_of(change(model)) == 2
    assert torch.equal(rf.remove(model)[0].weight, stored)


def test_an_inactive_adapter_can_be_squeezed_and_stays_inactive() -> None:
    model = lora()
    rf.adapt(model, "lora", rank=3, targets="0", name="other")
    active = {name for name, _ in trained(model).items()}
    rf.squeeze(model, 1, name="default")
    assert {name for name, _ in trained(model).items()} == active
    rf.use(model, "default")
    assert leaves_of(model)["up"].shape[1] == 1


def test_a_squeezed_adapter_is_exported_to_peft(tmp_path: Path) -> None:
    model = rf.squeeze(gated())
    report = rf.export(model, tmp_path / "peft", format="peft")
    assert all(row["exact"] for row in report.rows)
    x = normal(3, 8)
    torch.testing.assert_close(rf.load(linear(), tmp_path / "peft")(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, True, 2.0])
def test_an_impossible_rank_is_refused(rank: Any) -> None:
    with pytest.raises(InvalidRank, match="whole number"):
        rf.squeeze(lora(), rank)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(NotAdapted):
        rf.squeeze(linear(), 1)


@pytest.mark.parametrize("point", ["vera", "abba", "hra"])
def test_structures_without_one_product_are_refused_and_stay_as_they_are(point: str) -> None:
    model = disturbed(adapted(point, rank=2))
    x = normal(3, 8)
    before = model(x)
    with pytest.raises(Incompatible, match="one product"):
        rf.squeeze(model, 1)
    assert torch.equal(model(x), before)


def test_a_product_that_is_no_term_of_the_weight_only_loses_its_zero_terms() -> None:
    model = disturbed(adapted("hira", rank=3))
    leaves_of(model)["up"].data[:, 0] = 0
    before = change(model)
    with pytest.raises(Incompatible, match="not a term of the weight"):
        rf.squeeze(model, 1)
    torch.testing.assert_close(change(rf.squeeze(model)), before)
    assert leaves_of(model)["up"].shape[1] == 2
