"""Projected gradients: bases, what is kept for them, and what becomes of the rest."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankfold.errors import InvalidOption, InvalidRank
from rankfold.optim import (
    PROJECTORS,
    Adam,
    Coordinates,
    Cosines,
    CrossHead,
    Gaussian,
    Momentum,
    OnlinePCA,
    ProjectedOptimizer,
    Projector,
    Randomized,
    Sampled,
    Scaled,
    cosines,
    frugal,
)
from rankfold.optim.frequencies import cosine_scores

SGD = Momentum(0.0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one(shape: tuple[int, ...] = (6, 10), **options: Any) -> tuple[nn.Parameter, ProjectedOptimizer]:
    parameter = nn.Parameter(drawn(*shape))
    return parameter, ProjectedOptimizer([("w", parameter)], **{"lr": 0.1, "rank": 2, **options})


def moved(parameter: nn.Parameter, optimizer: ProjectedOptimizer, gradient: Tensor) -> Tensor:
    """Return what a step with this gradient has added."""
    before = parameter.detach().clone()
    parameter.grad = gradient.clone().to(parameter.dtype)
    optimizer.step()
    return parameter.detach() - before


def rank_of(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-8))


# GaLore -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_the_first_step_is_the_best_approximation_of_that_rank(shape: tuple[int, int]) -> None:
    parameter, optimizer = one(shape, inner=SGD)
    gradient = drawn(*shape, seed=1)
    left, values, right = torch.linalg.svd(gradient)
    wanted = -0.1 * (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(moved(parameter, optimizer, gradient), wanted)


def test_until_a_refresh_every_change_lies_in_one_subspace_and_ranks_add_up_over_refreshes() -> None:
    parameter, optimizer = one(refresh=3)
    start, spans = parameter.detach().clone(), []
    for step in range(6):
        change = moved(parameter, optimizer, drawn(6, 10, seed=step))
        assert rank_of(change) == 2
        spans.append(optimizer.state[parameter]["basis.basis"].clone())
        rest = change - spans[-1] @ (spans[-1].T @ change)
        assert rest.abs().max() < 1e-12
    assert torch.equal(spans[0], spans[2])
    assert not torch.allclose(spans[2], spans[3])
    assert torch.equal(spans[3], spans[5])
    assert rank_of(parameter.detach() - start) == 4


def test_a_first_gradient_of_zeros_does_not_choose_the_subspace_of_the_interval() -> None:
    parameter, optimizer = one(inner=SGD, refresh=100)
    moved(parameter, optimizer, torch.zeros(6, 10))
    left, values, right = torch.linalg.svd(drawn(6, 10, seed=1))
    wanted = -0.1 * (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(moved(parameter, optimizer, drawn(6, 10, seed=1)), wanted)
    assert int(optimizer.state[parameter]["due"]) == 101
    names, after = [f"w{at}" for at in range(8)], []
    weights = [nn.Parameter(drawn(6, 10)) for _ in names]
    spread = ProjectedOptimizer(list(zip(names, weights, strict=True)), rank=2, refresh=100, staggered=True)
    for step in range(2):
        for weight in weights:
            weight.grad = drawn(6, 10, seed=1) * step
        spread.step()
        after.append({int(spread.state[weight]["due"]) for weight in weights})
    assert after[0] == {0}
    assert len(after[1]) > 1


@pytest.mark.parametrize("projector", ["svd", "orthonormal", "dct", "coordinates", "sampled"])
def test_with_the_full_rank_gradient_descent_is_plain(projector: str) -> None:
    parameter, optimizer = one(rank=6, projector=projector, inner=SGD, refresh=2)
    for step in range(4):
        gradient = drawn(6, 10, seed=step)
        torch.testing.assert_close(moved(parameter, optimizer, gradient), -0.1 * gradient)


def test_full_coordinates_are_adam() -> None:
    parameter, optimizer = one(rank=6, projector="coordinates", weight_decay=0.1)
    other = nn.Parameter(parameter.detach().clone())
    adam = torch.optim.AdamW([other], lr=0.1, weight_decay=0.1, eps=1e-12)
    optimizer.inner = Adam(eps=1e-12)
    for step in range(5):
        moved(parameter, optimizer, drawn(6, 10, seed=step))
        other.grad = drawn(6, 10, seed=step)
        adam.step()
        torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize(("side", "rows"), [("auto", 6), ("reverse", 10), ("left", 6), ("right", 10)])
def test_the_side_that_is_asked_for_is_projected(side: str, rows: int) -> None:
    parameter, optimizer = one(side=side)
    moved(parameter, optimizer, drawn(6, 10, seed=1))
    assert optimizer.state[parameter]["basis.basis"].shape == (rows, 2)
    assert optimizer.state[parameter]["exp_avg"].shape == (2, 16 - rows)


def test_what_is_kept_has_the_promised_size_and_is_tensors_alone() -> None:
    for projector, numbers in (("svd", 2 * 6), ("dct", 2), ("gaussian", 2)):
        parameter, optimizer = one(projector=projector)
        moved(parameter, optimizer, drawn(6, 10, seed=1))
        state = optimizer.state[parameter]
        assert all(isinstance(value, Tensor) for value in state.values())
        assert sum(value.numel() for key, value in state.items() if key.startswith("basis.")) == numbers
        assert sum(state[key].numel() for key in ("exp_avg", "exp_avg_sq")) == 2 * 2 * 10


# Bases ------------------------------------------------------------------------------------------------


def fitted(
    projector: Projector, gradient: Tensor, rank: int, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    kept = projector.fit(gradient, rank, {}, torch.Generator().manual_seed(seed))
    return kept, projector.matrix(kept, gradient)


@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_down_and_up_are_the_matrix_and_its_transpose(name: str) -> None:
    projector, gradient = PROJECTORS[name], drawn(7, 9)
    kept, matrix = fitted(projector, gradient, 3)
    torch.testing.assert_close(projector.down(gradient, kept), matrix.T @ gradient)
    torch.testing.assert_close(projector.up(drawn(3, 9), kept, gradient), matrix @ drawn(3, 9))
    if name != "gaussian":
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(3, dtype=torch.float64))


def decaying(rows: int, columns: int, power: float = 1.0) -> Tensor:
    left, _, right = torch.linalg.svd(drawn(rows, columns), full_matrices=False)
    return (left * torch.arange(1, len(right) + 1, dtype=torch.float64) ** -power) @ right


def test_a_range_keeps_the_energy_of_the_exact_basis_and_finds_low_rank_exactly() -> None:
    gradient = decaying(60, 80)
    exact, found = (fitted(p, gradient, 8)[1] for p in (Projector(), Randomized()))
    energy = [float((basis.T @ gradient).square().sum()) for basis in (exact, found)]
    assert energy[1] >= 0.99 * energy[0]
    low = drawn(60, 3) @ drawn(3, 80, seed=1)
    exact, found = (fitted(p, low, 3)[1] for p in (Projector(), Randomized()))
    torch.testing.assert_close(found @ found.T, exact @ exact.T)


def test_a_range_that_starts_from_the_last_basis_comes_closer() -> None:
    gradient, projector = decaying(60, 80, 0.5), Randomized(oversampling=2, iterations=0)
    kept, first = fitted(projector, gradient, 8)
    for seed in range(3):
        kept = projector.fit(gradient, 8, kept, torch.Generator().manual_seed(seed))
    energy = [float((basis.T @ gradient).square().sum()) for basis in (first, kept["basis"])]
    assert energy[1] > 1.001 * energy[0]


def test_cosines_are_orthonormal_and_the_best_choice_of_all() -> None:
    matrix, gradient = cosines(6), drawn(6, 9)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(6, dtype=torch.float64))
    kept, basis = fitted(Cosines(), gradient, 3)
    scores = (matrix @ gradient).norm(dim=1)
    best = max(
        itertools.combinations(range(6), 3), key=lambda chosen: float(scores[list(chosen)].square().sum())
    )
    assert tuple(kept["indices"].tolist()) == best
    rest = (gradient - basis @ (basis.T @ gradient)).square().sum()
    assert rest <= (1 - 3 / 6) * gradient.square().sum()


@pytest.mark.parametrize("size", [255, 256, 257])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_scores_by_a_fast_transform_are_those_of_the_product(size: int, norm: str) -> None:
    for gradient in (drawn(size, 1100), drawn(1100, size).T):
        turned = cosines(size) @ gradient
        wanted = turned.abs().sum(1) if norm == "l1" else turned.square().sum(1)
        torch.testing.assert_close(cosine_scores(gradient, norm), wanted)


def test_a_basis_that_starts_from_the_last_one_keeps_its_signs() -> None:
    gradient, projector = decaying(30, 40), Randomized()
    _, first = fitted(projector, gradient, 4)
    turned = {"basis": first * torch.tensor([1, -1, -1, 1])}
    again = projector.fit(gradient, 4, turned, torch.Generator().manual_seed(1))["basis"]
    assert (again * turned["basis"]).sum(0).min() > 0.9


def test_normal_bases_are_right_in_the_mean_with_the_known_error() -> None:
    gradient, total, errors = drawn(10, 4), torch.zeros(10, 4, dtype=torch.float64), []
    for seed in range(4000):
        matrix = fitted(Gaussian(), gradient, 3, seed)[1]
        found = matrix @ (matrix.T @ gradient)
        total += found / 4000
        errors.append(float((found - gradient).square().sum() / gradient.square().sum()))
    torch.testing.assert_close(total, gradient, atol=0.15, rtol=0)
    assert sum(errors) / len(errors) == pytest.approx(11 / 3, rel=0.05)


def test_larger_singular_values_are_drawn_more_often_and_all_of_them_sometimes() -> None:
    gradient, counts = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])), torch.zeros(4)
    for seed in range(500):
        counts += fitted(Sampled(), gradient, 2, seed)[1].abs().sum(1)
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert counts.min() > 20
    full, exact = (fitted(p, drawn(4, 6), 4)[1] for p in (Sampled(), Projector()))
    torch.testing.assert_close(full @ full.T, exact @ exact.T)


def test_online_principal_components_converge_to_the_leading_subspace() -> None:
    gradient = decaying(12, 20, 2.0)
    projector = OnlinePCA(rate=0.2)
    kept = {"basis": torch.linalg.qr(drawn(12, 3, seed=5)).Q}
    for _ in range(6000):
        projector.stepped(gradient, projector.down(gradient, kept), kept, 1.0)
    wanted, found = fitted(Projector(), gradient, 3)[1], kept["basis"]
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-3, rtol=0)
    projector.stepped(torch.zeros_like(gradient), torch.zeros(3, 20), kept, 1.0)
    assert kept["basis"].isfinite().all()


def test_online_principal_components_do_not_see_how_large_a_gradient_is() -> None:
    gradient, projector, bases = drawn(6, 9), OnlinePCA(), []
    for size in (1.0, 100.0):
        kept = {"basis": torch.linalg.qr(drawn(6, 2, seed=5)).Q}
        projector.stepped(size * gradient, projector.down(size * gradient, kept), kept, 1.0)
        bases.append(kept["basis"])
    torch.testing.assert_close(*bases)


def test_heads_with_one_row_space_share_its_basis() -> None:
    rows = drawn(2, 9)
    gradient = torch.cat([drawn(4, 2, seed=head) @ rows for head in range(3)])
    _, basis = fitted(CrossHead(3), gradient.T, 2)
    _, wanted = fitted(Projector(), gradient.T, 2)
    torch.testing.assert_close(basis @ basis.T, wanted @ wanted.T)


# The rest ---------------------------------------------------------------------------------------------


def test_without_an_inner_optimizer_the_scaled_rest_gives_plain_descent() -> None:
    parameter, optimizer = one(inner=SGD, residual=Scaled(growth=math.inf))
    gradient = drawn(6, 10, seed=1)
    torch.testing.assert_close(moved(parameter, optimizer, gradient), -0.1 * gradient, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("projector", ["svd", "coordinates", "gaussian"])
def test_the_rest_itself_and_what_is_kept_are_the_gradient(projector: str) -> None:
    parameter, optimizer = one(inner=SGD, residual="sgd", projector=projector)
    gradient = drawn(6, 10, seed=1)
    torch.testing.assert_close(moved(parameter, optimizer, gradient), -0.1 * gradient)


def test_every_column_of_the_rest_is_scaled_as_adam_scaled_what_was_kept_of_it() -> None:
    parameter, optimizer = one(residual=Scaled(growth=math.inf), scale=0.25)
    mean, square = torch.zeros(2, 10).double(), torch.zeros(2, 10).double()
    for step in range(1, 4):
        gradient = drawn(6, 10, seed=step) * torch.logspace(-2, 2, 10)
        change = moved(parameter, optimizer, gradient)
        basis = optimizer.state[parameter]["basis.basis"]
        low = basis.T @ gradient
        mean, square = 0.9 * mean + 0.1 * low, 0.999 * square + 0.001 * low**2
        adam = mean / (square.sqrt() + 1e-8) * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        phi = adam.norm(dim=0) / low.norm(dim=0)
        wanted = -0.1 * (0.25 * basis @ adam + (gradient - basis @ low) * phi)
        torch.testing.assert_close(change, wanted.to(change), atol=1e-6, rtol=1e-5)


def test_the_scaled_rest_has_full_rank_and_grows_by_a_limited_factor() -> None:
    parameter, optimizer = one(residual="scaled", scale=0.25)
    sizes = []
    for step in range(5):
        change = moved(parameter, optimizer, drawn(6, 10, seed=step) * (100 if step == 3 else 1))
        assert rank_of(change) == 6
        sizes.append(float(optimizer.state[parameter]["rest_norm"]))
    assert all(new <= 1.01 * old * (1 + 1e-9) for old, new in itertools.pairwise(sizes))


def test_a_gradient_of_zeros_does_not_keep_the_rest_small_for_ever() -> None:
    parameter, optimizer = one(inner=SGD, residual="scaled")
    moved(parameter, optimizer, torch.zeros(6, 10))
    gradient = drawn(6, 10, seed=1)
    torch.testing.assert_close(moved(parameter, optimizer, gradient), -0.1 * gradient)
    moved(parameter, optimizer, torch.zeros(6, 10))
    rest = moved(parameter, optimizer, 100 * gradient)
    basis = optimizer.state[parameter]["basis.basis"]
    rest, whole = (each - basis @ (basis.T @ each) for each in (rest, -0.1 * gradient))
    torch.testing.assert_close(rest, 1.01 * whole)  # it has grown by as much as it may, from the last one


def test_the_rest_of_coordinates_is_moved_by_its_sign_alone() -> None:
    parameter, optimizer = one(projector="coordinates", residual="sign", lr=0.5)
    gradient = drawn(6, 10, seed=1)
    change = moved(parameter, optimizer, gradient)
    chosen = optimizer.state[parameter]["basis.indices"].long()
    others = [row for row in range(6) if row not in chosen.tolist()]
    torch.testing.assert_close(change[others], -0.5 * gradient[others].sign())
    adam = -0.5 * gradient[chosen] / (gradient[chosen].abs() + 1e-8 / 0.001**0.5)
    torch.testing.assert_close(change[chosen], adam, atol=1e-6, rtol=1e-5)


def test_the_sparse_rest_moves_its_support_alone() -> None:
    parameter, optimizer = one(residual="sparse", projector="coordinates")
    optimizer.residual = type(optimizer.residual)(density=0.1)
    for step in range(3):
        change = moved(parameter, optimizer, drawn(6, 10, seed=step))
        chosen = optimizer.state[parameter]["basis.indices"].long()
        others = torch.ones(6, 10, dtype=torch.bool)
        others[chosen] = False
        assert int((change[others] != 0).sum()) == 6
    assert len(optimizer.state[parameter]["support"]) == 6


# Refreshes --------------------------------------------------------------------------------------------


def two_bases(transport: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state before and after the first refresh but one."""
    parameter, optimizer = one(refresh=2, transport=transport, lr=0.0)
    for step in range(2):
        moved(parameter, optimizer, drawn(6, 10, seed=step))
    before = copy.deepcopy(optimizer.state[parameter])
    moved(parameter, optimizer, torch.zeros(6, 10, dtype=torch.float64) + drawn(6, 10, seed=9))
    return before, optimizer.state[parameter]


def test_moments_are_kept_turned_or_reset() -> None:
    gradient = drawn(6, 10, seed=9)
    for transport in ("keep", "rotate", "reset"):
        before, after = two_bases(transport)
        old, new = before["basis.basis"], after["basis.basis"]
        shared = {"keep": torch.eye(2, dtype=torch.float64), "rotate": new.T @ old}.get(transport)
        mean = torch.zeros(2, 10, dtype=torch.float64) if shared is None else shared @ before["exp_avg"]
        torch.testing.assert_close(after["exp_avg"], 0.9 * mean + 0.1 * new.T @ gradient)
        assert int(after["inner_step"]) == (1 if transport == "reset" else 3)
        assert (after["exp_avg_sq"] >= 0).all()


def refreshes(optimizer: ProjectedOptimizer, parameters: list[nn.Parameter], steps: int) -> list[int]:
    """Return how many bases changed in every step."""
    counts = []
    for step in range(steps):
        before = [optimizer.state[p].get("basis.basis") for p in parameters]
        for i, parameter in enumerate(parameters):
            parameter.grad = drawn(6, 10, seed=100 * i + step)
        optimizer.step()
        after = [optimizer.state[p]["basis.basis"] for p in parameters]
        counts.append(sum(b is None or not torch.equal(a, b) for a, b in zip(after, before, strict=True)))
    return counts


def test_refreshes_can_be_spread_over_the_interval() -> None:
    for staggered, most in ((False, 8), (True, 4)):
        parameters = [nn.Parameter(drawn(6, 10)) for _ in range(8)]
        named = [(f"w{i}", p) for i, p in enumerate(parameters)]
        optimizer = ProjectedOptimizer(named, rank=2, refresh=6, staggered=staggered)
        counts = refreshes(optimizer, parameters, 19)
        assert counts[0] == 8
        assert max(counts[1:]) <= most
        assert sum(counts[7:13]) == 8


def test_a_basis_that_stays_what_it_is_is_refreshed_less_often() -> None:
    parameter, optimizer = one(refresh=2, overlap=0.9)
    gradient = drawn(6, 10, seed=1)
    for _ in range(20):
        moved(parameter, optimizer, gradient)
    assert int(optimizer.state[parameter]["gap"]) == 16
    for step in range(40):
        moved(parameter, optimizer, drawn(6, 10, seed=step))
    assert int(optimizer.state[parameter]["gap"]) == 2


# In training ------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(40, 6),
            nn.ReLU(),
            nn.Linear(6, 4),
        ).to(dtype)


def train(model: nn.Module, optimizer: ProjectedOptimizer, steps: range, *, layerwise: bool = False) -> float:
    loss = torch.zeros(())
    for step in steps:
        x = drawn(16, 3, 5, seed=step)
        target = torch.tanh(x.sum((1, 2)))[:, None].expand(16, 4)
        loss = (model(x.to(next(model.parameters()).dtype)).float() - target).square().mean()
        loss.backward()
        if not layerwise:
            optimizer.step()
            optimizer.zero_grad()
    return float(loss)


OPTIONS: list[dict[str, Any]] = [
    *({"projector": name} for name in sorted(PROJECTORS)),
    *({"residual": name} for name in ("scaled", "sign", "sgd", "sparse")),
    *({"inner": name} for name in ("lion", "sgd", "adafactor")),
    {"transport": "rotate", "overlap": 0.5, "staggered": True},
    {"transport": "reset", "clip": 0.1, "weight_decay": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    def made(model: nn.Module) -> ProjectedOptimizer:
        return ProjectedOptimizer(model.named_parameters(), lr=1e-2, rank=3, refresh=4, **options)

    whole = network(dtype)
    first = made(whole)
    train(whole, first, range(6))
    resumed = copy.deepcopy(whole)
    second = made(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for each, optimizer in ((whole, first), (resumed, second)):
        train(each, optimizer, range(6, 14))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    moments = second.state[resumed[3].weight]
    assert all(v.dtype == torch.float32 for k, v in moments.items() if v.is_floating_point()), "cast to half"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_lowers_the_loss(options: dict[str, Any]) -> None:
    model = network()
    rate = 3e-2 if options.get("inner") == "sgd" else 3e-3
    optimizer = ProjectedOptimizer(model.named_parameters(), lr=rate, rank=3, refresh=10, **options)
    first = train(model, optimizer, range(1))
    assert train(model, optimizer, range(1, 120)) < 0.8 * first


def test_stepping_in_backward_is_the_same_and_frees_every_gradient() -> None:
    models = [network(), network()]
    optimizers = [ProjectedOptimizer(m.named_parameters(), lr=1e-2, rank=3, refresh=4) for m in models]
    handle = optimizers[1].step_in_backward()
    train(models[0], optimizers[0], range(6))
    train(models[1], optimizers[1], range(6), layerwise=True)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
        assert second.grad is None
    handle.remove()
    models[1](torch.ones(1, 3, 5)).sum().backward()
    assert all(p.grad is not None for p in models[1].parameters())


def test_steps_in_backward_have_the_rates_of_a_state_that_was_loaded_after() -> None:
    model = network()
    optimizer = ProjectedOptimizer(model.named_parameters(), lr=1e-2, rank=3)
    optimizer.step_in_backward()
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2), layerwise=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_schedule_starts_from_the_rate_that_the_groups_have_then() -> None:
    _, optimizer = one()
    optimizer.param_groups[0]["lr"] = 0.7
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.35


def test_a_copy_goes_on_like_the_original() -> None:
    model = network()
    optimizer = ProjectedOptimizer(model.named_parameters(), lr=1e-2, rank=3, residual="scaled")
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    train(model, optimizer, range(2))
    both = [(model, optimizer), copy.deepcopy((model, optimizer))]
    for each in both:
        train(*each, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m, _ in both), strict=True))


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_small_steps_are_not_lost_in_bfloat16(rounding: str) -> None:
    found = {}
    for how in ("nearest", rounding):
        parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = ProjectedOptimizer([parameter], lr=1e-4, rank=64, projector="coordinates", rounding=how)
        for _ in range(50):
            parameter.grad = torch.ones(64, 64, dtype=torch.bfloat16)
            optimizer.step()
        found[how] = float(parameter.detach().float().mean())
    assert found["nearest"] == 1
    assert found[rounding] == pytest.approx(1 - 50 * 1e-4, abs=2**-9)  # half a step of bfloat16


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_a_weight_in_memory_does_not_matter(rounding: str, dtype: torch.dtype) -> None:
    start = drawn(6, 4, 3, 3).to(dtype)
    both = [nn.Parameter(start.clone().to(memory_format=torch.channels_last)), nn.Parameter(start.clone())]
    assert not both[0].is_contiguous()
    for parameter in both:
        optimizer = ProjectedOptimizer([parameter], lr=1e-2, rank=3, rounding=rounding, weight_decay=0.1)
        for step in range(3):
            parameter.grad = drawn(6, 4, 3, 3, seed=step).to(parameter)
            optimizer.step()
    torch.testing.assert_close(*both)
    assert (both[0] - start).abs().max() > 1e-2


def test_gradients_are_clipped_together_where_they_are_projected() -> None:
    parameter, optimizer = one(inner=SGD, clip=1e-3)
    change = moved(parameter, optimizer, drawn(6, 10, seed=1))
    assert float(change.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-4)


def test_a_step_that_is_compiled_is_the_same_step() -> None:
    models = [network(), network()]
    plain, compiled = (ProjectedOptimizer(m.named_parameters(), lr=1e-2, rank=3, refresh=2) for m in models)
    step = torch.compile(compiled.step)
    for number in range(5):
        for model, optimizer, take in zip(models, (plain, compiled), (plain.step, step), strict=True):
            train(model, optimizer, range(number, number + 1), layerwise=True)
            take()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_closure_is_evaluated_once_with_gradients() -> None:
    parameter, optimizer = one()
    calls = []

    def closure() -> Tensor:
        loss = parameter.square().sum()
        optimizer.zero_grad()
        loss.backward()
        calls.append(float(loss))
        return loss

    assert float(optimizer.step(closure)) == calls[0]
    assert len(calls) == 1


# Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 4], ids=["before a refresh", "at a refresh"])
@pytest.mark.parametrize("projector", ["svd", "coordinates"])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_changes(projector: str, steps: int) -> None:
    model = network()
    optimizer = ProjectedOptimizer(model.named_parameters(), lr=1e-2, rank=3, refresh=4, projector=projector)
    train(model, optimizer, range(steps))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    chosen = optimizer.state[model[3].weight].get("basis.indices", torch.tensor([0, 1, 2])).tolist()
    model[3].weight.grad[next(row for row in range(6) if row not in chosen), 0] = math.nan
    with pytest.raises(InvalidOption, match=r"the gradient of 3\.weight is not finite"):
        optimizer.step()
    after = [model.state_dict(), optimizer.state_dict()]
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    for number, state in before[1]["state"].items():
        assert all(torch.equal(value, after[1]["state"][number][key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 7}, r"w: rank 7 is more than its smaller side, 6"),
        ({"rank": 0}, "rank must be a finite number of at least 1, not 0"),
        ({"projector": "svdd"}, "no projector 'svdd'"),
        ({"inner": "adamm"}, "no inner 'adamm'"),
        ({"residual": "none"}, "no residual 'none'"),
        ({"side": "top"}, "side must be one of"),
        ({"transport": "move"}, "transport must be one of"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"lr": -1.0}, "lr must be"),
        ({"refresh": 0}, "refresh must be"),
        ({"refresh": 2.5}, "refresh must be a whole number, not 2.5"),
        ({"overlap": 1.5}, r"overlap must be in \(0, 1\], not 1.5"),
        ({"clip": -1.0}, "clip must be above 0, not -1.0"),
    ],
)
def test_what_is_impossible_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidOption, InvalidRank), match=message):
        one(**options)


def test_a_group_that_is_refused_is_not_added() -> None:
    _, optimizer = one()
    with pytest.raises(InvalidRank, match="v: rank 9 is more than its smaller side, 4"):
        optimizer.add_param_group({"params": [("v", nn.Parameter(torch.ones(4, 5)))], "rank": 9})
    with pytest.raises(InvalidOption, match="v is complex"):
        optimizer.add_param_group({"params": [("v", nn.Parameter(torch.ones(4, dtype=torch.complex64)))]})
    assert len(optimizer.param_groups) == 1


def test_finite_gradients_whose_norm_is_too_large_for_their_dtype_are_taken() -> None:
    parameter = nn.Parameter(torch.ones(256, 256, dtype=torch.float16))
    optimizer = ProjectedOptimizer([parameter], lr=0.5, rank=None)
    parameter.grad = torch.full_like(parameter, 400.0)
    assert not parameter.grad.norm().isfinite()
    optimizer.step()
    assert torch.equal(parameter, torch.full_like(parameter, 0.5))


def test_a_scalar_is_moved_as_it_is() -> None:
    scalar = nn.Parameter(torch.tensor(1.0))
    optimizer = ProjectedOptimizer([scalar], lr=0.25, rank=2)
    scalar.grad = torch.tensor(3.0)
    optimizer.step()
    assert float(scalar) == pytest.approx(0.75)


def test_sparse_gradients_and_clips_one_by_one_are_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = ProjectedOptimizer(embedding.named_parameters(), rank=2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InvalidOption, match="weight has a sparse gradient"):
        optimizer.step()
    with pytest.raises(InvalidOption, match="clip needs all gradients at once"):
        one(clip=1.0)[1].step_in_backward()


def test_a_parameter_without_a_gradient_stays_as_it_is_and_has_no_state() -> None:
    model = network()
    optimizer = ProjectedOptimizer(model.named_parameters(), lr=1e-2, rank=3, clip=1.0)
    before = model[3].weight.detach().clone()
    model[5](torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(model[3].weight, before)
    assert model[3].weight not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()


def test_a_weight_whose_shape_has_changed_is_refused_and_nothing_else_moves() -> None:
    model = network()
    optimizer = ProjectedOptimizer(model.named_parameters(), lr=1e-2, rank=3)
    train(model, optimizer, range(2))
    model[5].weight.data = torch.ones(5, 6)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidOption, match=r"5\.weight has the shape \(5, 6\), .* made for \(4, 6\)"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_rank_that_changes_in_the_middle_is_refused() -> None:
    parameter, optimizer = one()
    moved(parameter, optimizer, drawn(6, 10))
    optimizer.param_groups[0]["rank"] = 3
    with pytest.raises(InvalidOption, match=r"w has moments of shape \(2, 10\) where \(3, 10\) is needed"):
        moved(parameter, optimizer, drawn(6, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "group 0 of the state was saved with rank 3, and this optimizer has 2"),
        ({"side": "reverse"}, "saved with side 'auto'"),
        ({"refresh": 7}, "saved with refresh 200"),
        ({"projector": "dct"}, r"saved with parts 'projector=Projector, inner=Adam\(betas=\(0.9"),
        ({"inner": "lion"}, "inner=Lion"),
        ({"residual": Scaled(2.0)}, r"residual=Scaled\(growth=2.0\)"),
        ({"seed": 1}, "seed=1"),
    ],
)
def test_a_state_of_another_configuration_is_refused(options: dict[str, Any], message: str) -> None:
    model = network()
    saved = ProjectedOptimizer(model.named_parameters(), rank=3)
    train(model, saved, range(2))
    optimizer = ProjectedOptimizer(model.named_parameters(), **{"rank": 3, **options})
    with pytest.raises(InvalidOption, match=message):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state


def test_rates_may_change_between_a_state_and_its_resumption() -> None:
    parameter, saved = one(weight_decay=0.1)
    moved(parameter, saved, drawn(6, 10))
    _, optimizer = one(lr=0.5)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1  # as everywhere in torch, those of the state
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_half_precision_that_cannot_be_rounded_at_random_is_refused_at_once() -> None:
    with pytest.raises(InvalidOption, match="stochastic rounding is for bfloat16"):
        ProjectedOptimizer([nn.Parameter(torch.ones(4, 4).half())], rank=2, rounding="stochastic")


def test_groups_may_differ_and_none_is_projected_without_a_rank() -> None:
    model = network()
    groups = [{"params": [model[3].weight], "rank": 2}, {"params": [model[5].weight], "rank": None}]
    optimizer = ProjectedOptimizer(groups, lr=1e-2, projector=Coordinates())
    train(model, optimizer, range(2))
    assert optimizer.state[model[3].weight]["exp_avg"].shape == (2, 40)
    assert optimizer.state[model[5].weight]["exp_avg"].shape == (4, 6)


# Whole weights that take turns -------------------------------------------------------------------------


def turns(steps: int, **options: Any) -> Iterator[tuple[list[nn.Parameter], Any, list[Tensor]]]:
    """Yield weights, their optimizer and their changes, after every step with gradients of ones."""
    parameters = [nn.Parameter(torch.zeros(4, 6)) for _ in range(4)]
    named = [(f"w{at}", parameter) for at, parameter in enumerate(parameters)]
    optimizer = frugal(
        named, 0.5, projector="blocks", **{"density": 0.5, "refresh": 3, "sign": 0.1, **options}
    )
    for step in range(steps):
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.full((4, 6), 2.0 + step)
        optimizer.step()
        yield parameters, optimizer, [p.detach() - b for p, b in zip(parameters, before, strict=True)]


def test_weights_take_turns_and_what_waits_keeps_nothing_and_moves_by_signs() -> None:
    seen = []
    for parameters, optimizer, changes in turns(6):
        active = [at for at, parameter in enumerate(parameters) if "exp_avg" in optimizer.state[parameter]]
        assert len(active) == 2
        for at in {0, 1, 2, 3} - set(active):
            torch.testing.assert_close(changes[at], torch.full((4, 6), -0.5 * 0.1))
        seen.append(active)
    assert seen[0] == seen[2] != seen[3] == seen[5]
    assert sorted(seen[0] + seen[3]) == [0, 1, 2, 3]


def test_weights_that_come_later_take_turns_too() -> None:
    parameters = [nn.Parameter(torch.zeros(4, 6)) for _ in range(4)]
    optimizer = frugal([("w0", parameters[0]), ("w1", parameters[1])], projector="blocks", density=0.5)
    later = [("w2", parameters[2]), ("w3", parameters[3])]
    with pytest.raises(InvalidOption, match="names that differ"):
        optimizer.add_param_group({"params": [("w1", parameters[2])], "turns": True})
    optimizer.add_param_group({"params": later, "turns": True})
    for parameter in parameters:
        parameter.grad = torch.ones(4, 6)
    optimizer.step()
    assert sum("exp_avg" in optimizer.state[parameter] for parameter in parameters) == 2


def test_every_turn_begins_with_a_step_of_one_rate() -> None:
    for step, (parameters, optimizer, changes) in enumerate(turns(12)):
        for parameter, change in zip(parameters, changes, strict=True):
            state = optimizer.state[parameter]
            if step % 3 == 0 and "exp_avg" in state:
                assert int(state["inner_step"]) == 1
                torch.testing.assert_close(change, torch.full((4, 6), -0.5), atol=1e-5, rtol=0)


def test_all_blocks_at_a_time_are_adam_until_the_next_turn() -> None:
    adam = nn.Parameter(torch.zeros(4, 6))
    plain = torch.optim.AdamW([adam], lr=0.5, weight_decay=0)
    for step, (parameters, _, _) in enumerate(turns(3, density=1.0)):
        adam.grad = torch.full((4, 6), 2.0 + step)
        plain.step()
        torch.testing.assert_close(parameters[0], adam)


def test_turns_of_a_resumed_run_go_on_bit_for_bit() -> None:
    def made(model: nn.Module) -> ProjectedOptimizer:
        return frugal(model, 1e-2, projector="blocks", density=0.3, refresh=2)

    whole = network()
    first = made(whole)
    train(whole, first, range(5))
    resumed = copy.deepcopy(whole)
    second = made(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for each, optimizer in ((whole, first), (resumed, second)):
        train(each, optimizer, range(5, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    other = frugal(network(), 1e-2, projector="blocks", density=0.5, refresh=2)
    with pytest.raises(InvalidOption, match=r"density=0\.3"):
        other.load_state_dict(first.state_dict())
