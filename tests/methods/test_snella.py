"""SNELLA: entries of all weights compete for a budget that falls."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._dynamic import Training, resumes
from methods._layers import adapted, change, count, disturbed, leaves_of, linear
from methods._layers import normal as drawn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.entries import SharedEntries, kernels, share_out
from rankfold.methods.recipe import resolve

SIZES = [48, 48, 32]  # of the weights of the perceptron


def recipe(**options: Any) -> rf.Recipe:
    return rf.Recipe(("snella", {"interval": 4, **options}))


def kept(training: Training) -> list[int]:
    return [int(kernel.kept.tensor()) for kernel in kernels(training.run).values()]  # type: ignore[union-attr]


def test_the_kernel_has_a_softmax_over_outputs_and_a_shift() -> None:
    model = disturbed(adapted("snella", linear(6, 8), rank=4, initial=0.5))
    assert count(model) == 4 * (6 + 8) + 3
    leaves = leaves_of(model)
    distance = (leaves["output"][:, :, None] - leaves["inputs"][:, None]).norm(dim=-1)
    total = 0.1 * (distance[0] - distance[1])
    kernel = total + leaves["scale"] * torch.softmax(total / leaves["width"], 0) + leaves["shift"]
    mask = kernel.abs() > kernel.abs().median()
    torch.testing.assert_close(change(model), torch.where(mask, kernel * kernel.abs(), 0).detach())
    assert int(leaves["kept"]) == 24


def test_at_every_event_the_budget_is_met_and_the_curve_goes_from_one_share_to_the_other() -> None:
    training = Training(recipe(warmup=0.2, final=0.2), 40)
    training.step(8)
    assert sum(kept(training)) == round(0.99 * 128)
    for step in range(9, 41):
        training.step()
        if step % 4 == 0:
            left = 1 - (min(step, 32) - 8) / 24
            first, last = round(0.99 * 128), round(0.2 * 128)
            assert sum(kept(training)) == int(last + (first - last) * left**3)
        assert all(0 < n <= size for n, size in zip(kept(training), SIZES, strict=True))
        for path, number in zip(("0", "2", "4"), kept(training), strict=True):
            assert (change(training.model, path) != 0).sum() == number
    assert sum(kept(training)) == round(0.2 * 128)


def test_entries_go_where_the_score_is_high_and_no_weight_gets_more_than_it_has() -> None:
    training = Training(recipe(), 40)
    training.step(3)

    def shared(scores: list[float], budget: int) -> list[int]:
        for path, score in zip(kernels(training.run), scores, strict=True):
            training.run.memory(path)["score"] = torch.tensor(score)
        with torch.no_grad():
            share_out(training.run, budget)
        return kept(training)

    assert shared([1, 3, 1], 50) == [10, 30, 10]
    assert shared([1, 6, 1], 80) == [16, 48, 16]  # and what the second cannot hold goes to the others
    assert shared([0, 0, 0], 60) == [20, 20, 20]
    assert shared([1, 0, 0], 128) == SIZES
    assert shared([1, 0, 0], 51)[0] == 48
    assert min(shared([1, 0, 0], 1)) == 1


def test_the_score_is_smoothed_sensitivity_times_its_deviation_averaged_over_each_factor() -> None:
    training = Training(recipe(beta1=0.6, beta2=0.7), 40)
    expected: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for _ in range(3):
        training.backward()
        for name in ("output", "inputs"):
            value = leaves_of(training.model)[name]
            new = (value * value.grad).abs().detach()
            mean, spread = expected.get(name, (torch.zeros_like(new), torch.zeros_like(new)))
            mean = 0.6 * mean + 0.4 * new
            expected[name] = mean, 0.7 * spread + 0.3 * (new - mean).abs()
        training.optimizer.step()
    total = sum((mean * spread).mean() for mean, spread in expected.values())
    torch.testing.assert_close(training.run.memory("0")["score"], total, rtol=1e-9, atol=0)


def test_a_training_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    resumes(recipe(), tmp_path)


def test_what_every_weight_keeps_is_saved_with_the_adapter(tmp_path: Path) -> None:
    training = Training(recipe(), 20)
    training.step(20)
    assert len(set(kept(training))) > 1
    rf.save(training.model, tmp_path / "end")
    model = copy.deepcopy(training.model)
    training.handle.remove()
    loaded = rf.load(rf.remove(model), tmp_path / "end")
    assert torch.equal(loaded(training.x), training.output())
    assert rf.fold(loaded)(training.x).isfinite().all()


def test_the_budget_moves_to_the_only_layer_that_has_to_change() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 12)).double()
    with torch.no_grad():
        for layer, seed in ((base[0], 1), (base[2], 2)):
            layer.weight.copy_(0.3 * drawn(12, 12, seed=seed))
            layer.bias.zero_()
    wanted = copy.deepcopy(base)
    with torch.no_grad():
        wanted[2].weight[:3] += 0.3 * drawn(3, 12, seed=5)
    model = rf.adapt(base, recipe(interval=5, zeroed=0.8), rank=8, targets=["0", "2"])
    training = Training(model, 60, rate=2e-2)
    training.x = drawn(256, 12)
    training.y = wanted(training.x).detach()
    training.step(60)
    first, second = kept(training)
    assert first + second == round(0.2 * 288)
    assert second > 2 * first


def test_options_out_of_range_are_refused() -> None:
    for options in ({"initial": 1.0}, {"warmup": 0.6, "final": 0.5}, {"interval": 0}, {"beta1": 1.0}):
        with pytest.raises(InvalidOption, match=next(iter(options))):
            resolve(recipe(**options), {})
    assert isinstance(resolve("snella", {}).training, SharedEntries)
    assert math.isclose(resolve("snella", {}).options["zeroed"], 0.8)
