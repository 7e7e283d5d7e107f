"""TRP: cuts, the subgradient of the nuclear norm, and the factors at the end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import convolution, leaves_of, linear, normal, rank_of
from methods._moving import INPUTS, WANTED, Training, assert_resumes, perceptron

import rankfold as rf
from rankfold.linalg import polar_factor
from rankfold.methods.rank_pruning import cut


def recipe(**options: Any) -> rf.Recipe:
    return rf.Recipe(("trp", options))


def training(total: int = 40, make: Any = torch.optim.SGD, **options: Any) -> Training:
    return Training(recipe(**options), rank=None, total=total, make=make, lr=0.1)


def weight_of(run: Training, path: str = "0") -> torch.Tensor:
    return leaves_of(run.model, path)["weight"]


def test_a_cut_has_the_smallest_rank_that_keeps_the_energy() -> None:
    plain = perceptron()[0].weight.detach()
    values = torch.linalg.svdvals(plain).square()
    kept = weight_of(training()).detach()
    rank = rank_of(kept)
    assert values[:rank].sum() >= 0.9 * values.sum() > values[: rank - 1].sum()
    torch.testing.assert_close(torch.linalg.svdvals(kept)[:rank].square(), values[:rank])


def test_between_cuts_a_weight_has_full_rank_and_every_m_steps_a_low_one() -> None:
    run = training(interval=5)
    ranks = []
    for _ in range(11):
        ranks.append(rank_of(weight_of(run).detach()))
        run.run(1)
    low = [rank for step, rank in enumerate(ranks) if step % 5 == 0]
    assert max(low) < 10
    assert all(rank == 10 for step, rank in enumerate(ranks) if step % 5)


def test_a_network_that_was_trained_so_is_cut_further_at_less_loss() -> None:
    """The rank that keeps 90 % of the energy, and what cutting to it costs, against plain training."""
    found = []
    for options in ({"energy": 1.0, "nuclear": 0.0}, {"interval": 10, "nuclear": 0.0}):
        run = training(total=105, threshold=None, **options)
        run.run(105)
        matrix = weight_of(run).detach()
        before = run.gradients()
        left, values, right = cut(matrix, 0.9)
        weight_of(run).data = left * values @ right
        found.append((len(values), run.gradients() / before - 1))
    (plain_rank, plain_cost), (rank, cost) = found
    assert rank <= plain_rank - 2
    assert cost < plain_cost / 2


def test_no_cut_comes_after_the_last_step() -> None:
    run = training(total=10, interval=5)
    run.run(10)
    assert rank_of(weight_of(run).detach()) == 10


def test_the_subgradient_has_norm_one_and_the_nuclear_norm_as_its_product_with_the_weight() -> None:
    run = training(interval=5, nuclear=0.3)
    run.run(5)
    start = weight_of(run).detach().clone()
    run.gradients()
    before = weight_of(run).grad.clone()
    run.optimizer.step()
    subgradient = (start - weight_of(run).detach()) / 0.1 - before
    subgradient = subgradient / 0.3
    assert torch.linalg.svdvals(subgradient)[0].item() == pytest.approx(1)
    assert (subgradient * start).sum().item() == pytest.approx(torch.linalg.svdvals(start).sum().item())
    torch.testing.assert_close(subgradient, polar_factor(start))


def test_it_acts_on_the_steps_of_the_cuts_only_the_first_included() -> None:
    run = training(interval=4, nuclear=0.3)
    for step in range(9):
        at = weight_of(run).detach().clone()
        run.gradients()
        plain = weight_of(run).grad.clone()
        run.optimizer.step()
        added = not torch.equal(weight_of(run).grad, plain)
        assert added == (step % 4 == 0), step
        if added:
            torch.testing.assert_close(weight_of(run).grad - plain, 0.3 * polar_factor(at))


def test_with_nothing_to_cut_and_no_subgradient_it_is_plain_training() -> None:
    run, plain = training(energy=1.0, nuclear=0.0, interval=3), perceptron()
    run.run(12)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(12):
        optimizer.zero_grad()
        (plain(INPUTS) - WANTED).square().mean().backward()
        optimizer.step()
    assert torch.equal(weight_of(run), plain[0].weight)
    assert torch.equal(run.function(), plain(INPUTS).detach())


def test_at_the_end_the_decomposition_is_handed_over_as_trained_factors() -> None:
    run = training(total=10, interval=5, threshold=0.3)
    run.run(10)
    before = weight_of(run).detach()
    run.handle.remove()
    leaves = leaves_of(run.model)
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    rank = int((values > 0.3).sum())
    assert leaves["up"].shape == (10, rank)
    assert leaves["down"].shape == (rank, 12)
    torch.testing.assert_close(leaves["up"] @ leaves["down"], (left * values)[:, :rank] @ right[:rank])
    torch.testing.assert_close(leaves["up"].T @ leaves["up"], leaves["down"] @ leaves["down"].T)
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in run.model.parameters()}
    assert rf.count(run.model).stored == sum(p.numel() for p in run.model.parameters())


def test_the_handle_of_a_training_that_is_not_at_its_end_leaves_the_weight_dense() -> None:
    for options, steps in (({}, 9), ({"threshold": None}, 10)):
        run = training(total=10, **options)
        run.run(steps)
        run.handle.remove()
        assert list(leaves_of(run.model)) == ["weight"]


def test_factors_are_saved_and_loaded(tmp_path: Path) -> None:
    run = training(total=6, threshold=0.3)
    run.run(6)
    run.handle.remove()
    rf.save(run.model, tmp_path / "model")
    loaded = rf.load(perceptron(), tmp_path / "model")
    assert torch.equal(loaded(INPUTS), run.model(INPUTS))


def seen_as(layout: str, matrix: torch.Tensor) -> torch.Tensor:
    """A kernel (6, 4, 3, 2), given as a matrix, as the paper's two matrices."""
    kernel = matrix.reshape(6, 4, 3, 2)
    return kernel.flatten(1) if layout == "channel" else kernel.permute(1, 2, 0, 3).reshape(12, 12)


@pytest.mark.parametrize(
    ("layout", "names"), [("channel", ("up", "down")), ("spatial", ("vertical", "horizontal"))]
)
def test_a_kernel_is_cut_and_handed_over_as_two_convolutions(
    layout: str, names: tuple[str, str], tmp_path: Path
) -> None:
    options = recipe(layout=layout, energy=0.8, threshold=0.4)
    model, x = rf.adapt(convolution(), options, targets=["0"]), normal(2, 4, 7, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = rf.attach(model, optimizer, total_steps=1)
    start = seen_as(layout, leaves_of(model)["weight"].detach())
    assert rank_of(start) < min(start.shape)
    model(x).square().mean().backward()
    optimizer.step()
    left, values, right = torch.linalg.svd(seen_as(layout, leaves_of(model)["weight"].detach()))
    rank = int((values > 0.4).sum())
    wanted = left[:, :rank] * values[:rank] @ right[:rank]
    handle.remove()
    leaves = leaves_of(model)
    assert sorted(leaves) == sorted(names)
    torch.testing.assert_close(seen_as(layout, model[0].expression.dense()), wanted)
    if layout == "channel":
        first, second = leaves["down"].reshape(rank, 4, 3, 2), leaves["up"].reshape(6, rank, 1, 1)
    else:
        first, second = leaves["vertical"].reshape(rank, 4, 3, 1), leaves["horizontal"].reshape(6, rank, 1, 2)
    inner = torch.nn.functional.conv2d(x, first)
    torch.testing.assert_close(model(x), torch.nn.functional.conv2d(inner, second, model[0].bias))
    rf.save(model, tmp_path / "model")
    assert torch.equal(rf.load(convolution(), tmp_path / "model")(x), model(x))


@pytest.mark.parametrize("stop", [15, 17])
def test_a_training_that_was_interrupted_is_the_one_that_was_not(tmp_path: Path, stop: int) -> None:
    assert_resumes(recipe(interval=5, nuclear=0.01), tmp_path, stop=stop, rank=None)


def test_a_weight_of_zeros_is_cut_to_zeros() -> None:
    model = linear()
    model[0].weight.data.zero_()
    assert not leaves_of(rf.adapt(model, "trp"))["weight"].any()


def test_a_model_in_half_precision_is_decomposed_in_single_precision() -> None:
    model = rf.adapt(perceptron().bfloat16(), recipe(interval=2, threshold=0.3)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with rf.attach(model, optimizer, total_steps=4):
        for _ in range(4):
            optimizer.zero_grad()
            (model(INPUTS.bfloat16()) - WANTED.bfloat16()).square().mean().backward()
            optimizer.step()
    assert sorted(leaves_of(model)) == ["down", "up"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_frozen_weight_stays_bit_for_bit() -> None:
    run = training(total=4, interval=1, energy=0.5)
    weight = weight_of(run).requires_grad_(False)
    before = weight.clone()
    run.run(4)
    run.handle.remove()
    assert torch.equal(weight_of(run), before)
    assert sorted(leaves_of(run.model, "2")) == ["down", "up"]
