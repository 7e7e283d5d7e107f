"""RoseLoRA: rows of A and columns of B become sparse, and stay so."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._dynamic import Training, resumes
from methods._layers import base, change
from torch import Tensor

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.recipe import resolve
from rankfold.methods.sparse_rows import GONE, SparseRows

TOTAL = 40


def recipe(**options: Any) -> rf.Recipe:
    return rf.Recipe(("roselora", {"keep": 0.3, **options}))


def _rows(training: Training) -> list[Tensor]:
    """Return the columns of B and the rows of A of every weight, one per term."""
    return [rows.detach() for pair in training.pairs for rows in (pair.up.T, pair.down)]


def _rule(training: Training) -> SparseRows:
    rule = training.handle.methods["structure=roselora"]
    assert isinstance(rule, SparseRows)
    return rule


def test_the_share_that_is_kept_falls_cubically_between_warm_up_and_final_phase() -> None:
    training = Training(recipe(warmup=0.25, final=0.25), TOTAL)
    seen = []
    for step in range(1, TOTAL + 1):
        training.step()
        seen.append(_rule(training).share(training.run))
        left = min(1, max(0, 1 - (step - 10) / 20))
        assert math.isclose(seen[-1], 0.3 + 0.7 * left**3)
        for rows in _rows(training):
            width = rows.shape[1]
            assert ((rows != 0).sum(1) == math.ceil(round(seen[-1] * width, 9))).all()
    assert seen[9] == 1 > seen[10]
    assert seen[29] == seen[-1] == 0.3


def test_the_product_is_as_sparse_as_promised_and_other_entries_of_the_weight_keep_their_bits() -> None:
    training = Training(recipe(keep=0.2), TOTAL)
    training.step(TOTAL)
    for path in ("0", "2", "4"):
        stored, (out, columns) = base(training.model, path), change(training.model, path).shape
        held = 2 * math.ceil(round(0.2 * out, 9)) * math.ceil(round(0.2 * columns, 9))
        moved = training.model.get_submodule(path).expression.dense() != stored  # type: ignore[operator,union-attr]
        assert 0 < moved.sum() <= held
        folded = rf.fold(copy.deepcopy(training.model)).get_submodule(path).weight
        assert torch.equal(folded[~moved], stored[~moved])  # type: ignore[index]


@pytest.mark.parametrize("beta", [0.8, 0.0])
def test_entries_that_were_pruned_never_return_though_momentum_moves_them(beta: float) -> None:
    training = Training(recipe(beta=beta), TOTAL)
    gone = [torch.zeros_like(rows, dtype=torch.bool) for rows in _rows(training)]
    leaks = 0
    for step in range(TOTAL):
        training.backward()
        before = [rows.clone() for rows in _rows(training)]
        assert step == 0 or not any(bool(rows[mask].any()) for rows, mask in zip(before, gone, strict=True))
        training.optimizer.step()
        now = [rows == 0 for rows in _rows(training)]
        assert step == 0 or all(bool(new[old].all()) for new, old in zip(now, gone, strict=True))
        state = training.optimizer.state
        leaks += sum(int((state[pair.down]["exp_avg"][pair.down == 0] != 0).sum()) for pair in training.pairs)
        gone = now if step else gone
    assert leaks
    for pair in training.pairs:
        assert torch.equal(training.run.memory(pair.key)["down"] == GONE, pair.down == 0)


def test_importance_is_smoothed_sensitivity_before_the_step_and_the_least_important_go() -> None:
    training = Training(recipe(warmup=0.1, beta=0.6), TOTAL)
    pair = training.pairs[0]
    expected: Tensor | None = None
    for step in range(1, 7):
        training.backward()
        new = (pair.down * pair.down.grad).abs().detach()  # type: ignore[operator]
        expected = new if expected is None else 0.6 * expected + 0.4 * new
        training.optimizer.step()
        kept = math.ceil(_rule(training).share(training.run) * pair.down.shape[1])
        if step <= 4:
            torch.testing.assert_close(training.run.memory(pair.key)["down"], expected)
            assert kept == 8
            assert (pair.down != 0).all()
        else:
            order = expected.sort(1, descending=True).values
            assert torch.equal(pair.down != 0, expected >= order[:, kept - 1 : kept])


def test_nothing_is_pruned_before_b_has_moved() -> None:
    training = Training(recipe(keep=0.1, warmup=0.0, final=0.8), TOTAL)
    training.step()
    assert all(bool((pair.down != 0).all() and (pair.up != 0).all()) for pair in training.pairs)
    training.step()
    assert any(bool((pair.down == 0).any()) for pair in training.pairs)


def test_values_are_clamped_after_pruning() -> None:
    training = Training(recipe(clamp=3e-3), TOTAL)
    training.step(TOTAL)
    assert all(rows.abs().max() == 3e-3 for rows in _rows(training))


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"alpha": 32.0}])
def test_a_training_that_is_interrupted_goes_on_as_if_it_had_not_been(
    options: dict[str, Any], tmp_path: Path
) -> None:
    resumes(recipe(**options), tmp_path)


def test_one_association_is_learned_with_less_harm_to_the_others_than_lora_does() -> None:
    """An associative memory: a new value for one key, mostly in one entry, is seen by the other keys."""
    keys = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).relu().double()
    harm = {}
    for point in (recipe(keep=0.1, alpha=4.0), rf.Recipe(("lora", {"alpha": 4.0}))):
        model = torch.nn.Sequential(torch.nn.Linear(24, 24, bias=False)).double()
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(24))
        training = Training(rf.adapt(model, point, rank=2, targets=["0"]), 100, rate=2e-2)
        training.x, training.y = keys[:1], keys[:1] + torch.eye(24).double()[:1] + 0.01 * keys[1:2]
        last = training.step(100)
        assert last < 1e-3
        harm[resolve(point, {}).structure.name] = (
            (change(training.model, "0") @ keys[1:].T != 0).double().mean()
        )
    assert harm["roselora"] < 0.3 < harm["lora"]


def test_options_out_of_range_are_refused() -> None:
    for options in ({"keep": 0.0}, {"beta": 1.0}, {"clamp": 0.0}, {"warmup": 0.6, "final": 0.4}):
        with pytest.raises(InvalidOption, match=next(iter(options))):
            resolve(recipe(**options), {})
