"""TSV-M: leading singular vectors of all tasks, made orthogonal to one another."""

import pytest
import torch
from torch import Tensor

from rankfold.merging.papers.tsv_m import tsv_m, without_interference
from rankfold.merging.parts import Parts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(deltas: Tensor, weights: tuple[float, ...] | None = None, name: str = "w") -> Parts:
    base = normal(*deltas.shape[1:], seed=9)
    return Parts(name, tuple(base + deltas), weights or (1.0,) * len(deltas), base)


def orthogonal_tasks(tasks: int, rank: int, rows: int = 14, columns: int = 10) -> Tensor:
    """Return changes whose row spaces are orthogonal to one another, and their column spaces."""
    left = torch.linalg.qr(normal(rows, tasks * rank)).Q.split(rank, 1)
    right = torch.linalg.qr(normal(columns, tasks * rank, seed=1)).Q.split(rank, 1)
    return torch.stack([u @ normal(rank, rank, seed=5) @ v.T for u, v in zip(left, right, strict=True)])


def test_one_model_keeps_what_it_learned() -> None:
    delta = normal(1, 6, 4)
    assert torch.allclose(without_interference(delta), delta[0], atol=1e-13)


@pytest.mark.parametrize("rank", [5, 2, 1])
def test_tasks_in_orthogonal_subspaces_are_summed_untouched(rank: int) -> None:
    deltas = orthogonal_tasks(2, rank)
    assert float((without_interference(deltas) - deltas.sum(0)).norm()) < 1e-12


def test_the_merged_change_has_the_singular_values_of_all_tasks() -> None:
    deltas = normal(3, 9, 7)
    kept = torch.linalg.svdvals(deltas)[:, :2].flatten().sort(descending=True).values
    found = torch.linalg.svdvals(without_interference(deltas))
    assert torch.allclose(found[:6], kept, atol=1e-12)
    assert float(found[6]) < 1e-12


def test_the_same_task_twice_is_that_task() -> None:
    delta = orthogonal_tasks(1, 2)[0]
    assert torch.allclose(without_interference(torch.stack([delta, delta])), delta, atol=1e-12)


def test_more_tasks_than_components_keep_one_each() -> None:
    merged = without_interference(normal(5, 4, 3))
    assert merged.isfinite().all()
    assert float(merged.norm()) > 0.1


def test_weights_and_scale_multiply_what_tasks_learned() -> None:
    deltas = orthogonal_tasks(2, 3)
    given = parts(deltas, (0.5, 2.0))
    expected = given.origin + 3 * (0.5 * deltas[0] + 2 * deltas[1])
    assert torch.allclose(tsv_m(given, scale=3.0), expected, atol=1e-12)


@pytest.mark.parametrize(("shape", "name"), [((6,), "w"), ((3, 2, 2), "w"), ((4, 3), "embed.w")])
def test_of_other_tensors_the_mean_change_is_added(shape: tuple[int, ...], name: str) -> None:
    given = parts(normal(2, *shape), name=name)
    expected = given.origin + 2 * given.deltas.mean(0)
    assert torch.allclose(tsv_m(given, scale=2.0, plain=("embed*",)), expected)
