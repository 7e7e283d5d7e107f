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

Moving = tuple[dict[str, Any], str, Tensor]  # what is remembered, under which name, and the new value


def smoothed(memory: dict[str, Any], name: str, sensitivity: Tensor, beta1: float, beta2: float) -> Tensor:
    """Return the score I U of a sensitivity, remembering both averages under a name."""
    return all_smoothed([(memory, name, sensitivity)], beta1, beta2)[0]


def all_smoothed(moving: Sequence[Moving], beta1: float, beta2: float) -> list[Tensor]:
    """Return the scores I U of many sensitivities, which are taken together because most are small."""
    new = [value for *_, value in moving]
    mean, spread = ([_remembered(m, f"{n}.{what}", x) for m, n, x in moving] for what in ("mean", "spread"))
    torch._foreach_lerp_(mean, new, 1 - beta1)
    torch._foreach_lerp_(spread, torch._foreach_abs(torch._foreach_sub(new, mean)), 1 - beta2)
    for (memory, name, _), average, deviation in zip(moving, mean, spread, strict=True):
        memory[f"{name}.mean"], memory[f"{name}.spread"] = average, deviation
    return list(torch._foreach_mul(mean, spread))


def _remembered(memory: dict[str, Any], name: str, like: Tensor) -> Tensor:
    value: Tensor | None = memory.get(name)
    return torch.zeros_like(like) if value is None else value.to(like)


def sensitivity(value: Tensor) -> Tensor:
    """Return |w dL/dw|, entry by entry; zeros where there is no gradient."""
    return sensitivities([value])[0]


def sensitivities(values: Sequence[Tensor]) -> list[Tensor]:
    """Return |w dL/dw| of many tensors."""
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in values]
    return list(torch._foreach_abs(torch._foreach_mul([v.detach() for v in values], gradients)))


def remember_scores(run: Run, pairs: Sequence[TrainedPair], beta1: float, beta2: float) -> None:
    """Remember under "score" the score of every term of all products, (r,) each.

    It is its gate's, and the means of its column's and its row's.
    """
    if not pairs:
        return
    parts = [
        (run.memory(pair.key), name, value)
        for pair in pairs
        for name, value in (("up", pair.up), ("down", pair.down), ("gate", gate_of(pair)))
    ]
    new = sensitivities([value for *_, value in parts])
    moving = [(memory, name, value) for (memory, name, _), value in zip(parts, new, strict=True)]
    scores = iter(all_smoothed(moving, beta1, beta2))
    for pair, up, down, gate in zip(pairs, scores, scores, scores, strict=True):
        run.memory(pair.key)["score"] = gate + up.mean(0) + down.mean(1)


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
    share = weight / (2 * len(pairs))
    for pair in pairs:
        up, down = pair.up.detach(), pair.down.detach()
        add_slope(pair.up, up @ _normed_error(up.T @ up, share))
        add_slope(pair.down, _normed_error(down @ down.T, share) @ down)


def _normed_error(gram: Tensor, weight: float) -> Tensor:
    """Return 2 weight E / ||E||_F for E = gram - I, zeros for E = 0; a device is never asked which."""
    gram.diagonal().sub_(1)
    norm = torch.linalg.matrix_norm(gram)
    return gram.mul_(torch.where(norm == 0, 0, 2 * weight / norm))


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
