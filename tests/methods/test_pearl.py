"""PEARL: ranks from the energy of a task vector."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods._layers import leaves_of, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import BaseMismatch, InvalidOption
from rankfold.methods import LeftOut
from rankfold.methods.ranks.pearl import energy_rank, task_ranks


def spectrum(*values: float) -> Tensor:
    left, right = torch.linalg.qr(normal(7, 7)).Q, torch.linalg.qr(normal(6, 6, seed=2)).Q
    return left[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ right[: len(values)]


def states(change: Tensor, reference: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    reference = torch.zeros_like(change) if reference is None else reference
    return {"layer.weight": reference}, {"layer.weight": reference + change}


def test_weights_that_have_not_moved_get_no_rank() -> None:
    weight = normal(7, 6)
    assert task_ranks(*states(torch.zeros(7, 6, dtype=torch.float64), weight)) == {"layer": 0}


def test_the_worked_spectrum_gives_three() -> None:
    assert task_ranks(*states(spectrum(5, 3, 2, 1, 0.5)), energy=0.9) == {"layer": 3}


@given(st.integers(1, 6))
def test_all_of_the_energy_gives_the_rank_that_was_planted(rank: int) -> None:
    assert energy_rank(normal(7, rank) @ normal(rank, 6, seed=2), 1.0) == rank


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_the_rank_does_not_fall_with_the_energy(first: float, second: float) -> None:
    change = normal(7, 6)
    low, high = sorted((first, second))
    assert 1 <= energy_rank(change, low) <= energy_rank(change, high) <= 6


def test_a_task_near_the_reference_asks_for_less() -> None:
    change, reference = spectrum(5, 3, 2, 1, 0.5), spectrum(*[9.0] * 6)
    near = [task_ranks(*states(size * change, reference), near=0.1)["layer"] for size in (0.1, 1.0, 100.0)]
    assert near[0] < near[1] < near[2] == 3


def test_the_largest_rank_is_a_cap() -> None:
    assert task_ranks(*states(normal(7, 6)), energy=1.0, largest=2) == {"layer": 2}


class Model(nn.Module):
    """A linear layer, a convolution, attention, and an embedding that is not moved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = nn.Linear(8, 6), nn.Conv2d(4, 6, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.embed = nn.Embedding(5, 8)


def test_models_are_compared_weight_by_weight_and_the_ranks_adapt_the_reference() -> None:
    with torch.random.fork_rng(devices=[]):
        reference = Model().double()
    tuned = copy.deepcopy(reference)
    tuned.linear.weight.data += normal(6, 2) @ normal(2, 8, seed=3)
    tuned.conv.weight.data += (normal(6, 3) @ normal(3, 36, seed=3)).reshape(6, 4, 3, 3)
    tuned.attention.in_proj_weight.data += normal(24, 1) @ normal(1, 8, seed=3)
    found = task_ranks(reference, tuned, energy=1.0)
    assert found == {"linear": 2, "conv": 3, "attention.in_proj": 1, "attention.out_proj": 0, "embed": 0}
    recipe = rf.Recipe("lora", ranks=("pearl", {"ranks": found}))
    with pytest.warns(LeftOut, match="embed"):
        rf.adapt(reference, recipe, rank=4, targets=["linear", "conv", "embed"], uncalled="allow")
    assert leaves_of(reference, "linear")["up"].shape[1] == 2
    assert leaves_of(reference, "conv")["up"].shape[1] == 3


def test_without_ranks_the_refusal_names_the_function() -> None:
    with pytest.raises(InvalidOption, match=r"rankfold\.methods\.ranks\.pearl\.task_ranks"):
        rf.adapt(nn.Sequential(nn.Linear(4, 4)), "lora/pearl", rank=2)


def test_states_of_different_models_are_refused() -> None:
    before, after = states(normal(7, 6))
    with pytest.raises(BaseMismatch, match="only one of the two has other"):
        task_ranks(before, {**after, "other.weight": normal(2, 2)})
    with pytest.raises(BaseMismatch, match=r"\(7, 6\) before the task, \(6, 6\) after it"):
        task_ranks(before, {"layer.weight": normal(6, 6)})


@pytest.mark.parametrize("options", [{"energy": 0.0}, {"energy": 1.1}, {"near": -1.0}, {"largest": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match=f"pearl: {next(iter(options))} must be"):
        task_ranks(*states(normal(7, 6)), **options)  # type: ignore[arg-type]
