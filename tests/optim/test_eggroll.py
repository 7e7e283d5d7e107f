"""The estimate of a low-rank evolution strategy is right on average; no perturbation is formed for it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.optim.noise import normals
from rankfold.optim.perturbed import perturbable


class Network(nn.Module):
    """One of every layer that can be perturbed, and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 5, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(5)
        self.mid = nn.Linear(5, 4)
        self.rms = nn.RMSNorm(4)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.conv(self.embed(ids).mT).mT
        hidden = self.rms(torch.tanh(self.mid(self.norm(hidden))))
        result: Tensor = self.head(self.grouped(hidden.mT).mT).mean(1)
        return result


def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network()
        for parameter in model.parameters():
            parameter.data.normal_()
    return model.double()


def strategy_of(model: nn.Module, **options: Any) -> Any:
    return rf.optim.eggroll(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def perturbations(strategy: Any, member: int) -> dict[str, Tensor]:
    """Return a member's perturbation of every parameter, formed, from the estimate for its fitness alone."""
    alone = torch.zeros(strategy.population, dtype=torch.float64)
    alone[member] = -math.sqrt(strategy.population)
    found: dict[str, Tensor] = strategy.estimate(alone)
    return found


IDS = torch.arange(14).view(2, 7) % 7


@pytest.mark.parametrize("rank", [1, 3])
def test_members_compute_what_their_formed_perturbations_say(rank: int) -> None:
    model = network()
    strategy = strategy_of(model, population=6, rank=rank, sigma=0.3)
    with strategy.perturbed():
        found = model(strategy.repeated(IDS)).view(6, 2, 3)
    assert not any(m._forward_hooks for m in model.modules())
    for member in range(6):
        alone = copy.deepcopy(model)
        for name, change in perturbations(strategy, member).items():
            alone.get_parameter(name).data += change
        torch.testing.assert_close(found[member], alone(IDS))
    pair = [perturbations(strategy, member) for member in (2, 3)]
    for name, change in pair[0].items():
        assert torch.equal(change, -pair[1][name]), name
        assert change.any(), name
    names = {name for name, _ in model.named_parameters() if not name.startswith("grouped")}
    assert set(strategy.parameters) == names


def test_perturbations_have_the_rank_and_uncorrelated_entries_of_mean_0_and_variance_1() -> None:
    model = nn.Linear(6, 5, bias=False)
    strategy = strategy_of(model, population=4000, rank=2, sigma=0.5)
    noise = strategy._noise()
    left, right = noise.factors(model.weight, range(2000))
    formed = (left @ right.mT / math.sqrt(2)).flatten(1)
    assert torch.linalg.matrix_rank(formed[0].view(5, 6)) == 2
    assert formed.mean(0).abs().max() < 0.1
    covariance = formed.T @ formed / len(formed)
    assert (covariance - torch.eye(30)).abs().max() < 0.2


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_entries_approach_normal_numbers_as_the_rank_grows(rank: int) -> None:
    model = nn.Linear(6, 5, bias=False)
    left, right = (
        strategy_of(model, population=80_000, rank=rank)._noise().factors(model.weight, range(40_000))
    )
    formed = left @ right.mT / math.sqrt(rank)
    assert rf.optim.excess_kurtosis(formed) == pytest.approx(6 / rank, abs=0.35)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_estimate_of_a_linear_fitness_is_its_gradient_on_average(rank: int) -> None:
    model = nn.Linear(4, 3).double()
    count, sigma = 40_000, 0.1
    strategy = strategy_of(model, population=count, rank=rank, sigma=sigma)
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (4, 3))
    with strategy.perturbed():
        fitness = model(strategy.repeated(x[None])) @ gradient
    scale = -1 / (math.sqrt(count) * sigma**2)  # the mean of f E / sigma^2, with E of variance sigma^2
    found = {name: scale * value for name, value in strategy.estimate(fitness).items()}
    wanted = {"weight": gradient[:, None] * x, "bias": gradient}
    for name, value in wanted.items():
        assert (found[name] - value).norm() < 0.05 * value.norm(), name


class Sizes(TorchDispatchMode):
    """Notes how many numbers every tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)]
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made.append(result.numel())
        return result


def test_no_perturbation_is_formed_and_nothing_is_differentiated() -> None:
    model = nn.Linear(200, 300, bias=False)
    strategy = strategy_of(model, population=8)
    inputs = strategy.repeated(torch.ones(2, 200))
    with Sizes() as sizes, strategy.perturbed():
        outputs = model(inputs)
    assert max(sizes.made) <= 16 * 300  # outputs of two rows of eight members
    assert not outputs.requires_grad
    with Sizes() as sizes:
        strategy.estimate(outputs[::2, 0])
    assert [size for size in sizes.made if size >= 200 * 300] == [200 * 300]  # the estimate, once


def test_an_even_fitness_changes_nothing_and_the_changes_rank_is_at_most_that_of_all_pairs() -> None:
    model = nn.Linear(12, 9, bias=False)
    strategy = strategy_of(model, population=6, rank=1)
    before = model.weight.detach().clone()
    with strategy.perturbed():
        outputs = model(strategy.repeated(torch.ones(1, 12))) - before.sum(1)
    strategy.step(torch.tensor([3.0, 3.0, -1.0, -1.0, 0.5, 0.5]))
    assert torch.equal(model.weight, before)
    assert outputs.any()
    with strategy.perturbed():
        model(strategy.repeated(torch.ones(1, 12)))
    strategy.step(torch.arange(6.0))
    assert torch.linalg.matrix_rank(model.weight.detach() - before, rtol=1e-4) == 3


def test_numbers_are_normal_and_depend_on_the_seed_and_the_index_alone() -> None:
    drawn = normals(5, 0, 3000, 7)
    assert torch.equal(drawn[1000:1010], normals(5, 1000, 10, 7))
    assert not torch.equal(drawn, normals(6, 0, 3000, 7))
    flat = drawn.flatten().sort().values
    levels = (torch.arange(len(flat)) + 0.5) / len(flat)
    assert (torch.special.ndtr(flat) - levels).abs().max() < 0.015  # Kolmogorov and Smirnov
    correlation = drawn.T.corrcoef() - torch.eye(7)
    assert correlation.abs().max() < 0.08


def test_a_population_in_parts_is_the_whole_population() -> None:
    model = network()
    strategy = strategy_of(model, population=8)
    with strategy.perturbed():
        whole = model(strategy.repeated(IDS))
    parts = []
    for start in (0, 2, 6):
        members = range(start, {0: 2, 2: 6, 6: 8}[start])
        with strategy.perturbed(members):
            parts.append(model(strategy.repeated(IDS, members)))
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=1e-12)


def generation_of(strategy: Any, model: nn.Module) -> float:
    with strategy.perturbed():
        outputs = model(strategy.repeated(IDS)).view(strategy.population, -1)
    fitness = -(outputs - 1).square().mean(1)
    strategy.step(fitness)
    return fitness.mean().item()


def test_a_population_learns_without_a_backward_pass() -> None:
    model = network().requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    strategy = rf.optim.eggroll(model, optimizer, population=32, sigma=0.1)
    with torch.no_grad():
        fitness = [generation_of(strategy, model) for _ in range(40)]
    assert fitness[-1] > 0.2 * fitness[0]
    assert strategy.generation == 40
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Any) -> None:
    def build() -> tuple[Any, Any, Any]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return model, optimizer, rf.optim.eggroll(model, optimizer, population=8)

    whole, first, second = build(), build(), build()
    for _ in range(6):
        generation_of(whole[2], whole[0])
    for _ in range(3):
        generation_of(first[2], first[0])
    torch.save([part.state_dict() for part in first[:2]], tmp_path / "state.pt")
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True), strict=False):
        part.load_state_dict(state)
    for _ in range(3):
        generation_of(second[2], second[0])
    for wanted, found in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize(("reuse", "alike"), [(0, [True, True]), (1, [False, False]), (2, [True, False])])
def test_noise_is_drawn_anew_as_often_as_it_is_asked(reuse: int, alike: list[bool]) -> None:
    model = nn.Linear(3, 2)
    strategy = strategy_of(model, population=4, reuse=reuse)
    found = []
    for _ in range(3):
        found.append(strategy._noise().vector(model.bias, range(2)))
        generation = strategy.generation
        strategy.optimizer.param_groups[0]["eggroll_generation"] = generation + 1
    assert [torch.equal(found[0], later) for later in found[1:]] == alike


def test_tied_weights_have_one_perturbation() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)}).double()
    model["head"].weight = model["embed"].weight
    strategy = strategy_of(model, population=2, sigma=0.5)
    with strategy.perturbed():
        rows = model["embed"](strategy.repeated(torch.arange(5)))
        logits = model["head"](strategy.repeated(torch.eye(4, dtype=torch.float64)))
    torch.testing.assert_close(rows.view(2, 5, 4), logits.view(2, 4, 5).mT)


def test_fitness_is_standardised_by_the_mean_of_its_group_and_the_variance_of_all() -> None:
    strategy = strategy_of(nn.Linear(2, 2), population=4, group=2)
    fitness = torch.tensor([1.0, 3.0, 10.0, 20.0])
    wanted = torch.tensor([-1.0, 1.0, -5.0, 5.0]) / (fitness.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(strategy.standardised(fitness), wanted)


def test_layers_that_were_not_evaluated_are_not_moved() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    strategy = strategy_of(model, population=4)
    before = copy.deepcopy(model.state_dict())
    with strategy.perturbed():
        outputs = model["used"](strategy.repeated(torch.ones(1, 3)))
    strategy.step(outputs[:, 0])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"used.weight", "used.bias"}


def test_frozen_names_are_left_alone() -> None:
    strategy = strategy_of(network(), frozen=("embed", "bias"))
    assert not [name for name in strategy.parameters if "embed" in name or "bias" in name]
    assert "mid.weight" in strategy.parameters


def test_impossible_calls_are_refused_with_a_sentence() -> None:
    model = nn.Linear(3, 2)
    for options, sentence in (
        ({"population": 7}, "population must be even"),
        ({"sigma": 0.0}, "sigma above 0"),
        ({"population": 8, "group": 3}, "8 members cannot be shared out to groups of 3"),
        ({"frozen": ("weight", "bias")}, "holds no parameter of a layer that can be perturbed"),
    ):
        with pytest.raises(InvalidOption, match=sentence):
            strategy_of(model, **options)
    strategy = strategy_of(model, population=4)
    with pytest.raises(InvalidOption, match="no member was evaluated"):
        strategy.step(torch.arange(4.0))
    with strategy.perturbed():
        model(torch.ones(4, 3))
    before = model.weight.detach().clone()
    with pytest.raises(InvalidOption, match="fitness must be 4 finite numbers"):
        strategy.step(torch.tensor([1.0, 2.0, float("nan"), 0.0]))
    assert torch.equal(model.weight, before)
    with pytest.raises(InvalidOption, match="members must be whole pairs"), strategy.perturbed(range(1, 3)):
        pass
    with pytest.raises(Incompatible, match="6 rows cannot be shared by 4 members"), strategy.perturbed():
        model(torch.ones(6, 3))
    assert not perturbable(nn.Conv1d(2, 2, 1, padding_mode="circular", padding=0))
