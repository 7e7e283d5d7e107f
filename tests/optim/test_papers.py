"""The named projected optimizers are the points of the space that their papers describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.optim import Adam, ProjectedOptimizer

PAPERS = [m for m in rf.methods("optim") if get_type_hints(m.build)["return"] is ProjectedOptimizer]


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"embed": nn.Embedding(9, 8), "first": nn.Linear(8, 12), "second": nn.Linear(12, 6, bias=False)}
        )


def loss_of(model: Any, step: int) -> Tensor:
    ids = torch.arange(9)
    hidden = torch.tanh(model.first(model.embed(ids)))
    wanted = nn.functional.one_hot(ids % 6, 6).float()
    return (model.second(hidden) - wanted).square().mean()


@pytest.mark.parametrize("method", PAPERS, ids=lambda method: method.name)
def test_every_one_trains_a_model_and_projects_what_it_says(method: Any) -> None:
    model = network()
    sized = {} if method.name == "frugal" else {"rank": 4}
    optimizer = method.build(model, 1e-2, **sized)
    assert isinstance(optimizer, ProjectedOptimizer)
    first = float(loss_of(model, 0))
    for step in range(80):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert float(loss_of(model, 0)) < 0.7 * first
    moments = optimizer.state[model["first"].weight]["exp_avg"]  # type: ignore[index]
    assert moments.shape == ((2 if method.name == "frugal" else 4), 12)
    assert optimizer.state[model["embed"].weight]["exp_avg"].shape == (9, 8)  # type: ignore[index]


@pytest.mark.parametrize("method", PAPERS, ids=lambda method: method.name)
def test_every_one_is_resumed_from_a_file_bit_for_bit(method: Any, tmp_path: Path) -> None:
    def made() -> tuple[Any, ProjectedOptimizer, Any]:
        model = network()
        sized = {} if method.name == "frugal" else {"rank": 4}
        optimizer = method.build(model, 1e-2, **sized)
        for group in optimizer.param_groups:
            group["refresh"] = min(group["refresh"], 3)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def train(model: Any, optimizer: ProjectedOptimizer, schedule: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if step % 4 == 1:
                model["second"].weight.grad = None
            optimizer.step()
            schedule.step()

    whole, second = made(), made()
    train(*whole, range(5))
    torch.save([part.state_dict() for part in whole], tmp_path / "state.pt")
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    for run in (whole, second):
        train(*run, range(5, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "numbers"),
    [  # moments (4, 12) twice, a basis (8, 4) of float32, and what each keeps beside
        ("galore", {}, 2 * 4 * 12 + 8 * 4),
        ("galore2", {}, 2 * 4 * 12 + 8 * 4),
        ("sara-sampling", {}, 2 * 4 * 12 + 8 * 4),
        ("online-subspace-descent", {}, 2 * 4 * 12 + 8 * 4),
        ("fira", {}, 2 * 4 * 12 + 8 * 4 + 1),
        ("galore+", {"density": 0.125}, 2 * 4 * 12 + 8 * 4 + 3 * 12),
        ("dct-projection", {}, 2 * 4 * 12 + 4),
        ("frugal", {}, 2 * 2 * 12 + 2),
    ],
)
def test_the_state_of_a_weight_has_as_many_numbers_as_the_formula_and_some_counters(
    name: str, options: dict[str, Any], numbers: int
) -> None:
    model: Any = network()
    sized = {} if name == "frugal" else {"rank": 4}
    optimizer = rf.find_method(name).build(model, 1e-2, **sized, **options)
    loss_of(model, 0).backward()
    optimizer.step()
    kept = {k: v for k, v in optimizer.state[model.first.weight].items() if v.dtype != torch.int64}
    assert sum(value.numel() for value in kept.values()) == numbers
    assert all(value.dtype in (torch.float32, torch.int32) for value in kept.values())


def built(name: str, **options: Any) -> ProjectedOptimizer:
    return rf.find_method(name).build(network(), **options)  # type: ignore[no-any-return]


def test_weights_too_small_for_the_rank_are_moved_by_the_inner_optimizer() -> None:
    optimizer = built("galore", rank=7)
    ranks = {name: group["rank"] for group in optimizer.param_groups for name in group["param_names"]}
    assert ranks == {"first.weight": 7, "second.weight": None, "embed.weight": None, "first.bias": None}


def test_the_tables_of_a_model_are_not_projected_whatever_their_names() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(9, 8), "mid": nn.Linear(8, 8), "score": nn.Linear(8, 9)})
    for given, wanted in ((model, ["mid.weight"]), (model.named_parameters(), ["wte.weight", "mid.weight"])):
        optimizer = rf.optim.galore(given, rank=4)
        assert optimizer.param_groups[0]["param_names"][: len(wanted)] == wanted
        assert optimizer.param_groups[0]["rank"] == 4
        assert len(optimizer.param_groups[0]["params"]) == len(wanted) + (given is not model)
    chosen = rf.optim.galore(model, rank=4, plain=("mid",)).param_groups[0]["param_names"]
    assert chosen == ["wte.weight", "score.weight"]


def steps_of(optimizer: ProjectedOptimizer, gradients: list[Tensor]) -> Tensor:
    parameter = optimizer.param_groups[0]["params"][0]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().clone()


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, 9, generator=generator) for _ in range(count)]


def fresh(name: str, **options: Any) -> ProjectedOptimizer:
    parameter = nn.Parameter(torch.zeros(6, 9))
    return rf.find_method(name).build([("w", parameter)], 0.1, **options)  # type: ignore[no-any-return]


def test_fira_without_a_rest_and_galore_are_the_same() -> None:
    given = gradients(5)
    galore = steps_of(fresh("galore", rank=3), given)
    torch.testing.assert_close(steps_of(fresh("fira", rank=3, residual="drop"), given), galore)
    assert not torch.allclose(steps_of(fresh("fira", rank=3), given), galore)


def test_a_basis_whose_rate_is_zero_is_galore_without_refreshes() -> None:
    given = gradients(5)
    still = steps_of(fresh("online-subspace-descent", rank=3, rate=0.0), given)
    torch.testing.assert_close(still, steps_of(fresh("galore", rank=3, refresh=1000), given))


def test_frugal_without_signs_and_resets_is_galore() -> None:
    given = gradients(8)
    same = {"projector": "svd", "residual": "drop", "transport": "keep", "inner": Adam(eps=1e-6)}
    found = steps_of(fresh("frugal", density=0.5, refresh=3, scale=0.25, **same), given)
    assert torch.equal(found, steps_of(fresh("galore", rank=3, refresh=3), given))


def test_all_singular_vectors_are_galores_over_refreshes() -> None:
    given = gradients(8)
    found = steps_of(fresh("sara-sampling", rank=6, refresh=3), given)
    assert torch.equal(found, steps_of(fresh("galore", rank=6, refresh=3), given))


def test_frugal_without_anything_kept_is_the_sign() -> None:
    first, second = gradients(2)
    optimizer = fresh("frugal", density=0.0)
    moved = steps_of(optimizer, [first, second])
    torch.testing.assert_close(moved, -0.1 * (first.sign() + second.sign()))
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert sum(value.numel() for value in state.values() if value.is_floating_point()) == 0


def test_a_basis_stays_orthonormal_where_rates_rise_far_above_the_first() -> None:
    optimizer = fresh("online-subspace-descent", rank=3)
    optimizer.param_groups[0]["lr"] *= 25
    steps_of(optimizer, gradients(1) * 50)
    basis = optimizer.state[optimizer.param_groups[0]["params"][0]]["basis.basis"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-4, rtol=0)


def test_frugal_with_everything_kept_is_adam_and_with_little_is_nearly_the_sign() -> None:
    given = gradients(4)
    parameter = nn.Parameter(torch.zeros(6, 9))
    adam = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0)
    for gradient in given:
        parameter.grad = gradient.clone()
        adam.step()
    torch.testing.assert_close(steps_of(fresh("frugal", density=1.0), given), parameter.detach())
    optimizer = fresh("frugal", density=1e-9)
    moved = steps_of(optimizer, given[:1])
    kept = optimizer.state[optimizer.param_groups[0]["params"][0]]["basis.indices"].tolist()
    others = [row for row in range(6) if row not in kept]
    assert len(others) == 5
    assert torch.equal(moved[others], -0.1 * given[0][others].sign())
    with pytest.raises(InvalidOption, match="pass a model or parameters, not groups"):
        rf.optim.frugal([{"params": list(network().parameters())}])
    with pytest.raises(InvalidOption, match=r"density must be in \[0, 1\], not 1.5"):
        built("frugal", density=1.5)


def test_moments_of_cosines_that_stay_are_kept_and_new_ones_start_at_zero() -> None:
    optimizer = fresh("dct-projection", rank=3)
    parameter = optimizer.param_groups[0]["params"][0]
    first, second = gradients(2)
    steps_of(optimizer, [first])
    before = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    steps_of(optimizer, [second])
    after = optimizer.state[parameter]
    old, new = before["basis.indices"].tolist(), after["basis.indices"].tolist()
    low = optimizer.projector.down(second, {"indices": after["basis.indices"]})
    for place, frequency in enumerate(new):
        kept = before["exp_avg"][old.index(frequency)] if frequency in old else torch.zeros(9)
        torch.testing.assert_close(
            after["exp_avg"][place], 0.9 * kept + 0.1 * low[place], atol=1e-6, rtol=1e-5
        )
    assert set(old) & set(new)
