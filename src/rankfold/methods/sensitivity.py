"""How much gated terms matter, and how a budget of terms falls: what the AdaLoRA family shares.

The sensitivity of a number w is |w dL/dw|; smoothed over steps together with its own deviation,

    I = b1 I + (1 - b1) |w g|,   U = b2 U + (1 - b2) ||w g| - I|,   score = I U

(Zhang et al. 2023). It is taken before the optimizer's step, where w and g belong together. What got no
gradient in a step did not matter in it: its g is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .events import gate_of
from .run import Run, TrainedPair


def smoothed(memory: dict[str, Any], name: str, sensitivity: Tensor, beta1: float, beta2: float) -> Tensor:
    """Return the score I U of a sensitivity, remembering both averages under a name."""
    mean, spread = (_remembered(memory, f"{name}.{what}", sensitivity) for what in ("mean", "spread"))
    mean = beta1 * mean + (1 - beta1) * sensitivity
    spread = beta2 * spread + (1 - beta2) * (sensitivity - mean).abs()
    memory[f"{name}.mean"], memory[f"{name}.spread"] = mean, spread
    return mean * spread


def _remembered(memory: dict[str, Any], name: str, like: Tensor) -> Tensor:
    value: Tensor = memory.get(name, torch.zeros_like(like))
    return value.to(like)


def sensitivity(value: Tensor) -> Tensor:
    """Return |w dL/dw|, entry by entry; zeros where there is no gradient."""
    return torch.zeros_like(value) if value.grad is None else (value * value.grad).abs()


def triplet_scores(run: Run, pair: TrainedPair, beta1: float, beta2: float) -> Tensor:
    """Return the score of every term (r,): its gate's, and the means of its column's and its row's."""
    memory = run.memory(pair.key)
    parts = {"up": pair.up, "down": pair.down, "gate": gate_of(pair)}
    scores = {name: smoothed(memory, name, sensitivity(value), beta1, beta2) for name, value in parts.items()}
    return scores["gate"] + scores["up"].mean(0) + scores["down"].mean(1)


def remember_scores(run: Run, pairs: Sequence[TrainedPair], beta1: float, beta2: float) -> None:
    """Remember the score of every term of all products under "score"."""
    for pair in pairs:
        run.memory(pair.key)["score"] = triplet_scores(run, pair, beta1, beta2)


def scores_of(run: Run, pairs: Sequence[TrainedPair]) -> list[Tensor]:
    """Return the scores (r,) that are remembered of all products."""
    return [run.memory(pair.key)["score"] for pair in pairs]


def add_orthogonality(pairs: Sequence[TrainedPair], weight: float) -> None:
    """Add the gradient of `weight * mean over factors of ||P^T P - I||_F` to the factors' gradients.

    The mean is over all factors of the model, P = B and P = A^T. The gradient of a norm of E = P^T P - I is
    2 P E / ||E||_F.
    """
    if not weight:
        return
    for pair in pairs:
        add_slope(pair.up, weight / (2 * len(pairs)) * _orthogonality_slope(pair.up))
        add_slope(pair.down, weight / (2 * len(pairs)) * _orthogonality_slope(pair.down.T).T)


def _orthogonality_slope(columns: Tensor) -> Tensor:
    error = columns.T @ columns - torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    norm = torch.linalg.matrix_norm(error)
    return torch.zeros_like(columns) if norm == 0 else (2 / norm) * (columns @ error)


def add_slope(parameter: Tensor, slope: Tensor) -> None:
    """Add a penalty's gradient to a parameter's."""
    parameter.grad = slope.clone() if parameter.grad is None else parameter.grad.add_(slope)


def cubic_budget(step: int, begin: int, end: int, first: int, last: int) -> int:
    """Return the number of terms at a step: `first` up to `begin`, `last` from `end`, a cubic fall between.

    Example:
        >>> [cubic_budget(step, 10, 20, 100, 50) for step in (0, 10, 15, 20, 30)]
        [100, 100, 56, 50, 50]
    """
    if step <= begin:
        return first
    if step >= end:
        return last
    left = 1 - (step - begin) / (end - begin)
    return int(last + (first - last) * left**3)


def window(total_steps: int | None, warmup: float, final: float) -> tuple[int, int]:
    """Return the steps after shares `warmup` and `1 - final` of the training, at least one step apart.

    Example:
        >>> window(100, 0.1, 0.3)
        (10, 70)
    """
    assert total_steps is not None
    begin = int(warmup * total_steps)
    return begin, max(begin + 1, total_steps - round(final * total_steps))


def kept_terms(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return for every product which terms are among the `count` highest of all: masks (r,).

    Of equal scores the earlier terms are kept, so exactly `count` are.

    Example:
        >>> [mask.tolist() for mask in kept_terms([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])], 3)]
        [[True, True], [True, False]]
    """
    flat = torch.cat([s.detach().double().cpu() for s in scores])
    order = torch.sort(flat, descending=True, stable=True).indices[: max(0, count)]
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order] = True
    return [
        mask.to(score.device)
        for mask, score in zip(kept.split([len(s) for s in scores]), scores, strict=True)
    ]
