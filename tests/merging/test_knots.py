"""KnOTS: another rule of merging, applied in the tasks' common basis of outputs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rankfold import catalogue
from rankfold.errors import InvalidOption, UnknownMethod
from rankfold.merging.papers.knots import common_basis, knots
from rankfold.merging.papers.task_arithmetic import task_arithmetic
from rankfold.merging.parts import Parts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(deltas: Tensor, weights: tuple[float, ...] | None = None) -> Parts:
    base = normal(*deltas.shape[1:], seed=9)
    return Parts("w", tuple(base + deltas), weights or (1.0,) * len(deltas), base)


def low_rank(tasks: int = 3, rows: int = 9, columns: int = 7, rank: int = 2) -> Tensor:
    return normal(tasks, rows, rank) @ normal(tasks, rank, columns, seed=1)


@pytest.mark.parametrize("deltas", [normal(3, 9, 7), low_rank()], ids=["full rank", "low rank"])
def test_a_linear_rule_is_that_rule_without_the_basis(deltas: Tensor) -> None:
    given = parts(deltas, (0.3, 1.0, -2.0))
    expected = task_arithmetic(given, scale=0.7)
    merged = knots(given, rule="task-arithmetic", rule_options={"scale": 0.7})
    assert float((merged - expected).abs().max()) < 1e-12


def test_the_basis_is_orthonormal_shared_and_no_larger_than_needed() -> None:
    deltas = low_rank(tasks=3, rank=2)
    basis, aligned = common_basis(deltas, 1e-4)
    assert basis.shape == (9, 6)
    assert aligned.shape == (3, 6, 7)
    assert torch.allclose(basis.T @ basis, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(basis @ aligned, deltas, atol=1e-12)


def test_components_below_the_floor_are_left_out() -> None:
    deltas = torch.stack([torch.diag(torch.tensor([5.0, 1.0])), torch.zeros(2, 2)])
    assert common_basis(deltas, 2.0)[0].shape == (2, 1)
    merged = knots(parts(deltas.double()), rule="task-arithmetic", floor=2.0)
    assert torch.allclose(merged - normal(2, 2, seed=9), torch.diag(torch.tensor([5.0, 0.0])).double())


def test_a_rule_of_single_entries_acts_on_the_aligned_changes() -> None:
    given = parts(low_rank())
    basis, aligned = common_basis(given.deltas, 1e-4)
    ties = catalogue.get("merge", "ties").build
    zero = torch.zeros_like(aligned[0])
    expected = given.origin + basis @ ties(Parts("w", tuple(aligned), given.weights, zero))
    assert torch.allclose(knots(given), expected, atol=1e-10)
    assert not torch.allclose(knots(given), ties(given), atol=1e-3)


@pytest.mark.parametrize(("shape", "plain"), [((5,), ()), ((5, 4), ("w*",))])
def test_other_tensors_are_merged_by_the_rule_as_they_are(
    shape: tuple[int, ...], plain: tuple[str, ...]
) -> None:
    given = parts(normal(2, *shape), (1.0, 0.5))
    merged = knots(given, rule="task-arithmetic", rule_options={"scale": 2.0}, plain=plain)
    assert torch.equal(merged, task_arithmetic(given, scale=2.0))


@pytest.mark.parametrize("rule", ["knots", "opcm"])
def test_a_rule_that_does_not_work_tensor_by_tensor_is_refused(rule: str) -> None:
    with pytest.raises(InvalidOption, match="tensor by tensor"):
        knots(parts(normal(2, 3, 3)), rule=rule)


def test_a_rule_for_fewer_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    method = catalogue.get("merge", "task-arithmetic")
    narrow = replace(method, traits={**method.traits, "most": 2})
    monkeypatch.setitem(catalogue._METHODS, ("merge", "task-arithmetic"), narrow)
    with pytest.raises(InvalidOption, match="merges 2 models, not 3"):
        knots(parts(normal(3, 3, 3)), rule="task-arithmetic")


def test_an_unknown_rule_and_impossible_options_are_refused() -> None:
    given = parts(normal(2, 3, 3))
    with pytest.raises(UnknownMethod, match="tyes"):
        knots(given, rule="tyes")
    with pytest.raises(InvalidOption, match="no option 'depth'"):
        knots(given, rule="task-arithmetic", rule_options={"depth": 1})
    with pytest.raises(InvalidOption, match="floor"):
        knots(given, rule="task-arithmetic", floor=-1.0)
