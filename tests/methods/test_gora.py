"""GoRA: the start is a projected gradient step, and ranks follow the gradient."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._calibrated import assert_reloads, mean_gradient, pairs, squares
from methods._layers import adapted, base, change, expression_of, leaves_of, linear, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.ranks.gora import gora as share
from rankfold.methods.rules import Unit

DATA = {"data": pairs(), "loss": squares, "progress": False}


def start(point: str = "lora", *, rank: int = 3, model: nn.Module | None = None, **options: Any) -> nn.Module:
    recipe = rf.Recipe(point, ("gora", {key: options.pop(key) for key in ("gamma",) if key in options}))
    return adapted(recipe, model, rank=rank, **{**DATA, **options})


def projector(down: Tensor) -> Tensor:
    """Return the projector on the rows."""
    return torch.linalg.pinv(down) @ down


@pytest.mark.parametrize("options", [{}, {"alpha": 16}, {"alpha": 16, "rank_stabilised": True}])
@pytest.mark.parametrize("rank", [2, 5])
def test_the_change_is_the_projected_step_down_the_gradient_whatever_the_scaling(
    rank: int, options: dict[str, Any]
) -> None:
    model, gamma = start(rank=rank, gamma=0.1, **options), 0.1
    expected = (
        -gamma * math.sqrt(8 / rank) * mean_gradient(linear(), pairs()) @ projector(leaves_of(model)["down"])
    )
    torch.testing.assert_close(change(model), expected)


def test_the_up_factor_solves_the_normal_equations_with_the_papers_step() -> None:
    leaves = leaves_of(start(alpha=16, rank_stabilised=True))
    xi = 0.05 / math.sqrt(3 / 8) * math.sqrt(3) / 16
    rest = leaves["up"] @ leaves["down"] + xi * mean_gradient(linear(), pairs())
    assert (rest @ leaves["down"].T).abs().max() < 1e-9


def test_the_change_has_the_size_of_a_gradient_step_on_average() -> None:
    gradient = mean_gradient(linear(), pairs())
    sizes = [change(start(rank=rank, seed=seed)).norm().item() ** 2 for rank in (2, 4) for seed in range(60)]
    for part in (sizes[:60], sizes[60:]):
        assert sum(part) / 60 == pytest.approx(0.05**2 * gradient.norm().item() ** 2, rel=0.15)


def test_the_loss_falls_before_the_first_step() -> None:
    model, batch = start(gamma=1e-3), pairs()
    before, after = (sum(squares(m, b).item() for b in batch) for m in (linear(), model))
    assert after < before


def test_the_stored_weight_is_not_edited_and_both_factors_train() -> None:
    model = start()
    assert torch.equal(base(model), linear()[0].weight)
    squares(model, pairs()[0]).backward()
    assert all(leaves_of(model)[name].grad.norm() > 1e-3 for name in ("up", "down"))


def test_the_down_factor_is_loras() -> None:
    assert torch.equal(leaves_of(start())["down"], leaves_of(adapted("lora", rank=3))["down"])


def test_a_weight_without_a_gradient_starts_as_loras() -> None:
    model = start(loss=lambda model, batch: 0 * squares(model, batch))
    assert torch.equal(model(normal(5, 8)), linear()(normal(5, 8)))


@pytest.mark.parametrize("structure", ["dora", "gralora"])
def test_other_structures_start_down_the_gradient(structure: str) -> None:
    model = start(structure, rank=2)
    assert (change(model) * mean_gradient(linear(), pairs())).sum() < 0
    assert leaves_of(model)["up"].isfinite().all()


def test_the_adapter_loads_without_data_in_single_precision_over_half(tmp_path: Path) -> None:
    model = start(model=linear().bfloat16())
    assert leaves_of(model)["up"].dtype == torch.float32
    assert_reloads(model, linear().bfloat16(), normal(5, 8).bfloat16(), tmp_path)


def test_a_step_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InvalidOption, match="gamma must be positive"):
        start(gamma=0.0)


# Ranks ------------------------------------------------------------------------------------------------


class Known:
    """A weight whose importance is known."""

    device = torch.device("cpu")

    def __init__(self, importance: float) -> None:
        self.importance = importance

    def matrix(self) -> Tensor:
        """Return a weight of ones."""
        return torch.ones(2, 2)

    def statistic(self, name: str) -> Tensor:
        """Return a gradient of mixed signs."""
        return self.importance * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])


def units(*importances: float, shape: tuple[int, int] = (40, 24), **about: Any) -> list[Unit]:
    return [
        Unit(f"w{i}", shape, limit=24, **{"site": Known(importance), **about})
        for i, importance in enumerate(importances)
    ]


def test_ranks_are_in_proportion_to_the_importance() -> None:
    assert share(units(1, 2, 3), 4) == {"w0": 2, "w1": 4, "w2": 6}


def test_ranks_are_rounded_down_and_kept_within_their_bounds() -> None:
    assert share(units(1, 1.4, 100), 4) == {"w0": 2, "w1": 2, "w2": 11}
    assert share(units(1, 1.4, 100), 4, maximum=2) == {"w0": 2, "w1": 2, "w2": 8}
    assert share(units(1, 1.4, 100), 4, minimum=0) == {"w0": 0, "w1": 0, "w2": 11}


def test_a_wider_weight_gets_less_rank_for_the_same_importance() -> None:
    mixed = [*units(1), Unit("wide", (80, 48), limit=48, site=Known(1))]
    ranks = {cost: share(mixed, 6, cost=cost) for cost in ("linear", "root", "log")}
    assert ranks == {
        "linear": {"w0": 9, "wide": 4},
        "root": {"w0": 7, "wide": 5},
        "log": {"w0": 6, "wide": 5},
    }


def test_ranks_fit_the_structure() -> None:
    assert share(units(1, 3, multiple=4), 8) == {"w0": 4, "w1": 12}
    assert share(units(1, 3, multiple=4), 4, maximum=1.4) == {"w0": 4, "w1": 4}
    assert share(units(1, 100, shape=(40, 40)), 24, maximum=2) == {"w0": 12, "w1": 24}


def test_no_gradient_at_all_is_refused() -> None:
    with pytest.raises(InvalidOption, match="the gradient of every weight is zero"):
        share(units(0, 0), 4)


@pytest.mark.parametrize("options", [{"minimum": 2.0, "maximum": 1.0}, {"maximum": 0.5}, {"cost": "none"}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"gora: {next(iter(options))} must be"):
        share(units(1), 4, **options)


def two_layers() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6)).double()


@pytest.mark.parametrize("init", ["gora", "kaiming"])
def test_alpha_is_divided_by_the_rank_that_a_weight_got(init: str, tmp_path: Path) -> None:
    recipe = rf.Recipe("lora", init, "gora")
    model = rf.adapt(two_layers(), recipe, rank=2, alpha=12, **DATA)
    given = {path: leaves_of(model, path)["up"].shape[1] for path in ("0", "2")}
    layers = two_layers()
    (sum(squares(layers, batch) for batch in pairs()) / 3).backward()  # type: ignore[union-attr]
    weights = {path: layers.get_submodule(path).weight for path in ("0", "2")}
    importance = {path: (w * w.grad).abs().mean().item() for path, w in weights.items()}
    budget = 2 * (24 + 22)
    shares = {p: round(budget * i / sum(importance.values())) for p, i in importance.items()}
    assert given == {p: min(max(shares[p] // sum(weights[p].shape), 1), 8) for p in given}
    assert given["0"] != given["2"]
    for path, rank in given.items():
        leaves = leaves_of(model, path)
        torch.testing.assert_close(change(model, path), 12 / rank * leaves["up"] @ leaves["down"])
    assert_reloads(model, two_layers(), normal(5, 8), tmp_path)


def test_every_weight_steps_down_its_gradient_with_the_papers_ranks() -> None:
    recipe = rf.Recipe("lora", "gora", "gora")
    model = rf.adapt(two_layers(), recipe, rank=2, alpha=16, rank_stabilised=True, **DATA)
    losses = [sum(squares(m, b).item() for b in pairs()) for m in (two_layers(), model)]
    assert losses[1] < losses[0]
    assert expression_of(model, "0").formula() != expression_of(model, "2").formula()
