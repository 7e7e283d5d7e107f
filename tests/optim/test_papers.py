"""The named projected optimizers are the points of the space that their papers describe."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.optim import ProjectedOptimizer

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


def built(name: str, **options: Any) -> ProjectedOptimizer:
    return rf.find_method(name).build(network(), **options)  # type: ignore[no-any-return]


def test_weights_too_small_for_the_rank_are_moved_by_the_inner_optimizer() -> None:
    optimizer = built("galore", rank=7)
    ranks = {name: group["rank"] for group in optimizer.param_groups for name in group["param_names"]}
    assert ranks == {"first.weight": 7, "second.weight": None, "embed.weight": None, "first.bias": None}


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
    with pytest.raises(InvalidOption, match=r"density must be in \(0, 1\], not 1.5"):
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
