"""How much gated terms matter, and how a budget of terms falls: what the AdaLoRA family shares.

The sensitivity of a number w is |w dL/dw|; smoothed over steps together with its own deviation,

    I = b1 I + (1 - b1) |w g|,   U = b2 U + (1 - b2) ||w g| - I|,   score = I U

(Zhang et al. 2023). It is taken before the optimizer's step, where w and g belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .run import Run, TrainedPair


def smoothed(memory: dict[str, Any], name: str, sensitivity: Tensor, beta1: float, beta2: float) -> Tensor:
    """Return the score I U of a sensitivity, remembering both averages under a name."""
    mean = memory.get(f"{name}.mean", torch.zeros_like(sensitivity))
    spread = memory.get(f"{name}.spread", torch.zeros_like(sensitivity))
    mean = beta1 * mean + (1 - beta1) * sensitivity
    spread = beta2 * spread + (1 - beta2) * (sensitivity - mean).abs()
    memory[f"{name}.mean"], memory[f"{name}.spread"] = mean, spread
    return mean * spread


def triplet_scores(run: Run, pair: TrainedPair, beta1: float, beta2: float) -> Tensor:
    """Return the score of every term (r,): its gate's, and the means of its column's and its row's."""
    memory = run.memory(pair.key)
    parts = {"up": pair.up, "down": pair.down, "gate": pair.gate}
    scores = {
        name: smoothed(memory, name, (value * value.grad).abs(), beta1, beta2)
        for name, value in parts.items()
        if value is not None and value.grad is not None
    }
    total = torch.zeros(pair.rank, dtype=pair.up.dtype, device=pair.up.device)
    if "gate" in scores:
        total = total + scores["gate"]
    if "up" in scores:
        total = total + scores["up"].mean(0)
    if "down" in scores:
        total = total + scores["down"].mean(1)
    return total


def add_orthogonality(pairs: Sequence[TrainedPair], weight: float) -> None:
    """Add the gradient of `weight * mean over factors of ||P^T P - I||_F` to the factors' gradients.

    The mean is over all factors of the model, P = B and P = A^T.
    """
    if not weight:
        return
    for pair in pairs:
        for factor in (pair.up, pair.down):
            if factor.grad is None:
                continue
            columns = factor if factor is pair.up else factor.T
            error = columns.T @ columns - torch.eye(columns.shape[1], dtype=factor.dtype, device=factor.device)
            norm = torch.linalg.matrix_norm(error)
            if norm > 0:
                slope = (2 / norm) * (columns @ error)
                factor.grad += weight / (2 * len(pairs)) * (slope if factor is pair.up else slope.T)


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


def kept_terms(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return for every product which terms are among the `count` highest of all: masks (r,).

    Of equal scores the earlier terms are kept, so exactly `count` are.
    """
    flat = torch.cat([s.detach().double().cpu() for s in scores])
    order = torch.sort(flat, descending=True, stable=True).indices[: max(0, count)]
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order] = True
    return [
        mask.to(score.device) for mask, score in zip(kept.split([len(s) for s in scores]), scores, strict=True)
    ]
