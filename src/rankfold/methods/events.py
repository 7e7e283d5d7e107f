"""What happens to gated terms: masks that can be lifted again, removal, and growth.

Whatever a rule remembers per term follows a change of rank, as the optimizer's state does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optim.state import kept_and_fresh
from .run import Run, TrainedPair


def total_rank(pairs: Sequence[TrainedPair]) -> int:
    """Return the number of terms of all products."""
    return sum(pair.rank for pair in pairs)


def asked_total(run: Run, pairs: Sequence[TrainedPair]) -> int:
    """Return the rank that was asked for times the number of products."""
    return int(run.asked_rank or 1) * len(pairs)


def largest_rank(pair: TrainedPair) -> int:
    """Return the rank above which further terms add nothing: min(out, in)."""
    return min(pair.up.shape[0], pair.down.shape[1])


def gate_of(pair: TrainedPair) -> Tensor:
    """Return the gate (r,) of a product that has one."""
    assert pair.gate is not None
    return pair.gate


def initial_rank(options: Mapping[str, Any], rank: int) -> int:
    """Return the rank that a weight begins with: the option `initial` times the asked one, rounded up."""
    return math.ceil(float(options["initial"]) * rank)


def close(run: Run, pairs: Sequence[TrainedPair], masks: Sequence[Tensor]) -> None:
    """Multiply every gate by its mask (r,), and remember the masks."""
    for pair, mask in zip(pairs, masks, strict=True):
        run.memory(pair.key)["mask"] = mask
        gate_of(pair).mul_(mask.to(gate_of(pair)))


def close_again(run: Run, pairs: Sequence[TrainedPair]) -> None:
    """Multiply every gate by the mask that is remembered."""
    close(run, pairs, [run.memory(pair.key)["mask"] for pair in pairs])


def change_terms(
    run: Run,
    pair: TrainedPair,
    keep: Tensor,
    up: Tensor | None = None,
    down: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Keep some terms of a product and add fresh ones after them, as `Run.resize` does.

    Gradients that wait for the optimizer's step follow too, with zeros for the fresh terms, and so does what
    is remembered of the product: tensors under names that begin with "up" have terms as columns, all others
    as entries or rows. Numbers and scalars stay.
    """
    added = 0 if up is None else up.shape[1]
    parts = [(pair.up, 1), (pair.down, 0), (gate_of(pair), 0)]
    slopes = [None if p.grad is None else kept_and_fresh(p.grad, axis, keep, added) for p, axis in parts]
    run.resize(pair, keep, up, down, gate)
    for parameter, slope in zip((pair.up, pair.down, gate_of(pair)), slopes, strict=True):
        parameter.grad = slope
    memory = run.memory(pair.key)
    for name, value in memory.items():
        if isinstance(value, Tensor) and value.dim():
            memory[name] = kept_and_fresh(value, 1 if name.startswith("up") else 0, keep, added)


def drop_closed(run: Run) -> None:
    """Take all terms away whose gate is zero; the function stays, and one term of every product does."""
    for pair in run.pairs:
        open_terms = gate_of(pair).nonzero().flatten()
        keep = open_terms if len(open_terms) else torch.zeros(1, dtype=torch.long)
        if len(keep) < pair.rank:
            change_terms(run, pair, keep)


def over(run: Run) -> bool:
    """Say whether training has come to its end, as far as its length is known."""
    return run.total_steps is None or run.step >= run.total_steps
