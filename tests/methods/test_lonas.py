"""LoNAS: one adapter whose leading sub-adapters are trained in turn, and the choice of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import change, leaves_of, normal
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, InvalidRank
from rankfold.methods.ranks import lonas

RANK = 8
PATHS = ["q_proj", "k_proj", "v_proj", "up"]


class Attention(nn.Module):
    """Three projections that are one group, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in PATHS:
            self.add_module(name, nn.Linear(10, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(self.q_proj(x) * self.k_proj(x)) + self.v_proj(x)
        return self.up(mixed)  # type: ignore[no-any-return]


def host() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention().double()


def adapted(structure: str = "lora", **options: Any) -> nn.Module:
    recipe = rf.Recipe(structure, ranks=("lonas", options))
    return rf.adapt(host(), recipe, rank=RANK, targets=PATHS, alpha=16)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(rf.param_groups(model, lr=1e-2, weight_decay=0.1))


def backward(model: nn.Module) -> None:
    (model(normal(16, 10)) - normal(16, 10, seed=2)).square().mean().backward()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def widths(model: nn.Module) -> dict[str, int]:
    return {path: int(leaves_of(model, path)["gate"].sum()) for path in PATHS}


def test_the_projections_of_attention_share_their_width_and_others_have_their_own() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    with rf.attach(model, optimizer):
        seen = []
        for _ in range(40):
            step(model, optimizer)
            seen.append(widths(model))
    assert all(each["q_proj"] == each["k_proj"] == each["v_proj"] for each in seen)
    assert any(each["q_proj"] != each["up"] for each in seen)
    assert {each["up"] for each in seen} == {8, 6, 4}


def test_all_terms_act_before_training_and_after_it() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    assert set(widths(model).values()) == {RANK}
    with rf.attach(model, optimizer):
        for _ in range(3):
            step(model, optimizer)
    assert set(widths(model).values()) == {RANK}


def test_terms_beyond_the_width_have_no_gradient_and_nothing_moves_them_or_their_moments() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    with rf.attach(model, optimizer):
        for _ in range(3):
            step(model, optimizer)
        compared = 0
        for _ in range(8):
            active = widths(model)["up"]
            leaves = leaves_of(model, "up")
            tensors = {
                name: (leaves[name], *(optimizer.state[leaves[name]][m] for m in ("exp_avg", "exp_avg_sq")))
                for name in ("up", "down")
            }
            before = {name: [t.detach().clone() for t in each] for name, each in tensors.items()}
            step(model, optimizer)
            for name, each in tensors.items():
                gradient = leaves[name].grad if name == "down" else leaves[name].grad.T  # type: ignore[union-attr]
                assert torch.count_nonzero(gradient[active:]) == 0
                for now, then in zip(each, before[name], strict=True):
                    now, then = (t.detach() if name == "down" else t.detach().T for t in (now, then))
                    assert torch.equal(now[active:], then[active:])
                    assert not torch.equal(now[:active], then[:active])
                    compared += RANK - active
    assert compared > 0


def test_a_width_acts_as_the_leading_slice_at_the_full_ranks_scaling() -> None:
    model = adapted()
    leaves = leaves_of(model, "up")
    leaves["up"].data = normal(10, RANK)
    configuration = {"q_proj": 8, "k_proj": 8, "v_proj": 8, "up": 5}
    lonas.choose(model, configuration)
    torch.testing.assert_close(
        change(model, "up"), 2 * leaves["up"][:, :5].detach() @ leaves["down"][:5].detach()
    )


def test_full_width_is_the_ordinary_adapter() -> None:
    model, plain = adapted(), rf.adapt(host(), "lora", rank=RANK, targets=PATHS, alpha=16)
    leaves_of(model, "up")["up"].data = normal(10, RANK)
    leaves_of(plain, "up")["up"].data = normal(10, RANK)
    x = normal(4, 10)
    torch.testing.assert_close(model(x), plain(x), atol=1e-14, rtol=1e-14)


def trained_super_network(structure: str = "lora") -> nn.Module:
    model = adapted(structure)
    optimizer = optimizer_of(model)
    with rf.attach(model, optimizer):
        for _ in range(30):
            step(model, optimizer)
    return model


@pytest.mark.parametrize("structure", ["lora", "dora"])
def test_the_extracted_adapter_is_the_slice_and_plain(structure: str, tmp_path: Path) -> None:
    model = trained_super_network(structure)
    configuration = lonas.middle(model)
    assert configuration == dict.fromkeys(PATHS, 6)
    lonas.choose(model, configuration)
    x = normal(4, 10)
    before = model(x)
    lonas.extract(model, configuration)
    torch.testing.assert_close(model(x), before, atol=1e-13, rtol=1e-13)
    assert all("gate" not in leaves_of(model, path) for path in PATHS)
    assert all(leaves_of(model, path)["down"].shape[0] == 6 for path in PATHS)
    again = rf.load(host(), rf.save(model, tmp_path / "adapter"))
    assert torch.equal(again(x), model(x))


def test_hill_climbing_finds_the_configuration_that_scores_highest() -> None:
    model = trained_super_network()
    wanted = {"q_proj": 8, "k_proj": 8, "v_proj": 8, "up": 4}

    def score(candidate: nn.Module) -> float:
        now = widths(candidate)
        return -sum(abs(now[path] - wanted[path]) for path in PATHS)

    assert lonas.climb(model, score, rounds=40) == wanted
    assert widths(model) == wanted


def test_without_rounds_hill_climbing_is_the_heuristic() -> None:
    model = trained_super_network()
    assert lonas.climb(model, lambda _: 0.0, rounds=0) == lonas.middle(model)


@pytest.mark.parametrize("stop", [5, 9])
def test_resumed_training_is_the_same_bit_for_bit(stop: int, tmp_path: Path) -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    with rf.attach(model, optimizer):
        for done in range(14):
            if done == stop:
                rf.save(model, tmp_path / "adapter")
                torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            step(model, optimizer)
    again = rf.load(host(), tmp_path / "adapter")
    other = optimizer_of(again)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    with rf.attach(again, other):
        for _ in range(stop, 14):
            step(again, other)
    x = normal(4, 10)
    assert torch.equal(model(x), again(x))


def test_the_mask_is_not_trained_and_gets_no_group() -> None:
    model = adapted()
    held = {id(p) for group in rf.param_groups(model, lr=0.1) for p in group["params"]}
    assert all(id(leaves_of(model, path)["gate"]) not in held for path in PATHS)
    backward(model)
    assert all(not leaves_of(model, path)["gate"].requires_grad for path in PATHS)


def test_a_start_behind_a_closed_gate_is_refused_because_masks_do_not_train() -> None:
    with pytest.raises(Incompatible, match="behind a gate"):
        rf.adapt(host(), rf.Recipe("lora", init="random", ranks="lonas"), rank=RANK, targets=PATHS)


@pytest.mark.parametrize("configuration", [{}, dict.fromkeys(PATHS, 0), dict.fromkeys(PATHS, 9)])
def test_an_impossible_configuration_is_refused_and_changes_nothing(configuration: dict[str, int]) -> None:
    model = adapted()
    with pytest.raises(InvalidRank, match=r"a rank in 1\.\.8"):
        lonas.choose(model, configuration)
    assert set(widths(model).values()) == {RANK}


@pytest.mark.parametrize(
    "choices", [(), (0.5, 1.0), (1.5, 1.0), (1.0, 0.0), ("wide", "narrow"), (None,), ((1,),)]
)
def test_impossible_choices_are_refused(choices: tuple[float, ...]) -> None:
    with pytest.raises(InvalidOption, match="choices must be numbers that fall"):
        adapted(choices=choices)


def test_what_is_no_regular_expression_is_refused_before_anything_is_built() -> None:
    with pytest.raises(InvalidOption, match=r"lonas: together must be a regular expression, not '\(q': "):
        rf.adapt(nn.Sequential(nn.Linear(4, 4)), rf.Recipe("lora", ranks=("lonas", {"together": "(q"})))


def test_a_search_of_another_adapter_is_refused() -> None:
    with pytest.raises(InvalidOption, match="not lonas's"):
        lonas.middle(rf.adapt(host(), "lora", rank=2, targets=PATHS))
