"""AirLLM: ranks proposed by a guided diffusion model from a state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods._layers import leaves_of, linear
from torch import Tensor

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.ranks.airllm import (
    Proposer,
    decode,
    encode,
    penalised_reward,
    reward_weights,
    transmission_cost,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40), st.integers(0, 80), st.data())
def test_encoding_is_undone_by_decoding(least: int, spread: int, data: Any) -> None:
    ranks = torch.tensor(data.draw(st.lists(st.integers(least, least + spread), min_size=1, max_size=8)))
    z = encode(ranks, least, least + spread)
    assert (z.abs() <= 1).all()
    assert torch.equal(decode(z, least, least + spread), ranks)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_decoded_ranks_are_within_their_bounds(z: list[float]) -> None:
    ranks = decode(torch.tensor(z), 2, 9)
    assert ((ranks >= 2) & (ranks <= 9)).all()


def test_ranks_out_of_bounds_are_refused() -> None:
    with pytest.raises(InvalidOption, match=r"not all in 1\.\.8"):
        encode(torch.tensor([9]), 1, 8)


def test_the_cost_is_the_share_of_the_time_that_sending_takes() -> None:
    assert transmission_cost(1000, bandwidth=4000.0, snr=15.0, bits=16) == pytest.approx(1.0)
    assert transmission_cost(1000, bandwidth=4000.0, snr=15.0, latency=2.0) == pytest.approx(0.5)


def test_what_costs_too_much_is_penalised_whatever_its_loss() -> None:
    assert penalised_reward(0.5, 0.4) == pytest.approx(-0.54)
    assert penalised_reward(0.0, 1.2) == pytest.approx(-12.0)


def test_rewards_weigh_within_their_bounds_and_equal_rewards_alike() -> None:
    weights = reward_weights(torch.tensor([0.0, 1.0, 2.0, 1e3]))
    assert (weights.diff() >= 0).all()
    assert ((weights >= 0.1) & (weights <= 10)).all()
    assert torch.equal(reward_weights(torch.ones(3)), torch.ones(3))


class Known(Proposer):
    """A denoiser that knows the answer: the state itself where it is known, else zero."""

    def noise(self, z: Tensor, level: Tensor, state: Tensor, known: Tensor) -> Tensor:
        signal = self.signal[level.long()][:, None]
        clean = torch.where(known[:, None] > 0, state, torch.zeros_like(state))
        return (z - signal.sqrt() * clean) / (1 - signal).sqrt()


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_with_the_true_noise_the_sampler_finds_the_answer_from_any_noise(steps: int) -> None:
    state = torch.tensor([[0.5, -0.25, 0.9], [0.0, 0.1, -1.0]])
    found = Known(3, 3).sample(state, guidance=1.0, steps=steps, generator=generator())
    torch.testing.assert_close(found, state, atol=2e-4, rtol=0)


def test_a_denoiser_that_knows_the_ranks_has_no_loss_and_one_that_does_not_has() -> None:
    ranks = torch.tensor([[2, 9, 5], [1, 1, 16]])
    state = encode(ranks, 1, 16)
    loss, blind = (
        Known(3, 3, most=16)
        .double()
        .denoising_loss(ranks, state, torch.zeros(2), generator=generator(), dropped=dropped)
        for dropped in (0.0, 1.0)
    )
    assert loss < 1e-18
    assert blind > 1e-3


@pytest.mark.parametrize(("guidance", "factor"), [(0.0, 0.0), (1.0, 1.0), (1.5, 1.5)])
def test_guidance_goes_from_the_unconditional_answer_through_the_conditional_one(
    guidance: float, factor: float
) -> None:
    state = torch.tensor([[0.5, -0.25, 0.6]])
    found = Known(3, 3).sample(state, guidance=guidance, generator=generator())
    torch.testing.assert_close(found, factor * state, atol=2e-4, rtol=0)


def test_proposals_are_whole_ranks_within_bounds_and_repeat_with_their_generator() -> None:
    proposer = Proposer(5, 2, least=2, most=12)
    state = torch.tensor([[0.1, 0.2], [3.0, -1.0]])
    first, again = (proposer.propose(state, generator=generator(3)) for _ in range(2))
    assert first.shape == (2, 5)
    assert first.dtype == torch.int64
    assert ((first >= 2) & (first <= 12)).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, proposer.propose(state, generator=generator(4)))


def test_making_a_proposer_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Proposer(5, 2)
    assert torch.equal(torch.rand(3), expected)


def test_trained_on_what_was_tried_it_proposes_the_ranks_that_belong_to_the_state() -> None:
    proposer = Proposer(3, 1, most=16, hidden=64)
    optimizer = torch.optim.Adam(proposer.parameters(), lr=3e-3)
    ranks, state = torch.tensor([[2, 4, 8], [15, 12, 9]]), torch.tensor([[0.0], [1.0]])
    random = generator(1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = proposer.denoising_loss(
            ranks.repeat(32, 1), state.repeat(32, 1), torch.zeros(64), generator=random
        )
        loss.backward()
        optimizer.step()
    found = proposer.propose(state, steps=20, generator=generator(2))
    assert ((found - ranks).abs() <= 2).all()


def test_only_ranks_of_high_reward_pull_where_rewards_differ() -> None:
    proposer = Proposer(2, 1, most=8, hidden=16)
    ranks, state = torch.tensor([[1, 1], [8, 8]]), torch.zeros(2, 1)
    by_one = [
        proposer.denoising_loss(ranks, state, reward, generator=generator(5))
        for reward in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.zeros(2))
    ]
    torch.testing.assert_close(by_one[0] + by_one[1], 2 * by_one[2])
    assert not math.isclose(float(by_one[0].detach()), float(by_one[1].detach()))


def test_the_ranks_chosen_make_an_adapter() -> None:
    recipe = rf.Recipe("lora", ranks=("airllm", {"ranks": {"0": 3}}))
    assert leaves_of(rf.adapt(linear(), recipe, rank=8))["up"].shape[1] == 3


def test_without_ranks_the_refusal_names_the_proposer() -> None:
    with pytest.raises(InvalidOption, match=r"rankfold\.methods\.ranks\.airllm\.Proposer"):
        rf.adapt(linear(), "lora/airllm", rank=2)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(InvalidOption, match="airllm: most must be at least 5, not 4"):
        Proposer(3, 1, least=5, most=4)
    with pytest.raises(InvalidOption, match="steps must be"):
        Proposer(3, 1).sample(torch.zeros(1, 1), steps=0)
