"""A low-rank weight starts as the best part of the usual one, and neither it nor its gradient is formed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankfold as rf


def fresh() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 16)).double()


def leaves(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    adapter = model[0].adapters["default"]  # type: ignore[index]
    return adapter.leaf("up").tensor(), adapter.leaf("down").tensor()


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_start_is_the_best_part_of_the_usual_one_split_evenly(rank: int) -> None:
    up, down = leaves(rf.adapt(fresh(), "low-rank", rank=rank))
    left, values, right = torch.linalg.svd(fresh()[0].weight.detach(), full_matrices=False)
    torch.testing.assert_close((up @ down).detach(), left[:, :rank] * values[:rank] @ right[:rank])
    torch.testing.assert_close((up.T @ up).detach(), torch.diag(values[:rank]))
    torch.testing.assert_close((down @ down.T).detach(), torch.diag(values[:rank]))


def test_training_keeps_factors_and_what_goes_through_them_alone() -> None:
    model, kept = rf.adapt(fresh(), "low-rank", rank=2), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.ones(300, 24, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(x).sum().backward()
    optimizer.step()
    assert {tuple(shape) for shape in kept} <= {(300, 24), (300, 2), (16, 2), (2, 24), (24, 2), (2, 16)}
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == 2 * (16 + 24) + 16
