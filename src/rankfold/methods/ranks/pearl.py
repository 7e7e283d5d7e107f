"""PEARL: a weight gets the rank that holds most of the energy of its move during a short fine-tuning.

    T = W_tuned - W_reference = U S V^T,   r = min { k : sum_{i<=k} S_i^2 >= theta sum_i S_i^2 }

Bhat et al. 2025. From the abstract: the ranks of a task's adapter follow how near the task's weights lie to
reference weights. **The rule is a reconstruction**, with theta = 0.9 a guess; with `near` > 0 a task that
stays near the reference asks for less, theta d / (d + near) at the relative distance d = ||T||_F /
||W_reference||_F. Convolutions count as matrices (out, in times window). A weight that has not moved gets
rank 0 and is left out.

    found = task_ranks(reference, tuned)
    rf.adapt(reference, Recipe("lora", ranks=("pearl", {"ranks": found})), rank=8)

A short noisy fine-tuning has a flat spectrum and asks for high ranks; `largest` caps them. Start: the
structure's and the initialiser's; one adapter per task, the base stays as it is.

Deviation: factors do not start from the truncated task vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import BaseMismatch
from ..limits import in_range
from ..registry import ranks
from ..rules import Unit
from ..tables import tabled

State = nn.Module | Mapping[str, Tensor]


@ranks(
    "pearl",
    status="experimental",
    example={"ranks": {"*": 2}},
    title="Parameter Efficient Continual Learning with Dynamic Low-Rank Adaptation",
    year=2025,
    arxiv="2505.11998",
    formula="r = min { k : sum_{i<=k} S_i^2 >= theta sum S_i^2 }, S of W_tuned - W_reference",
)
def pearl(units: Sequence[Unit], rank: int, *, ranks: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the ranks that task vectors ask for, cut to what a weight can hold.

    Args:
        units: the weights.
        rank: what alpha is divided by.
        ranks: by path, as `rankfold.methods.ranks.pearl.task_ranks` returns them.
    """
    given = tabled("pearl", units, ranks, "pearl.task_ranks(reference, tuned)")
    return {unit.path: unit.fitted(given[unit.path]) if given[unit.path] else 0 for unit in units}


def task_ranks(
    reference: State, tuned: State, *, energy: float = 0.9, near: float = 0.0, largest: int | None = None
) -> dict[str, int]:
    """Return the rank that every weight's task vector asks for, by the weight's path.

    Args:
        reference: model or state dict before the task.
        tuned: the same after a short full fine-tuning.
        energy: theta, share of the squared singular values that the rank holds, in (0, 1].
        near: relative distance at which a task asks for half of theta, at least 0.
        largest: the most that a weight gets, at least 1; None does not cap.

    Raises:
        InvalidOption: a number is out of range.
        BaseMismatch: the two do not hold the same weights.

    Example:
        >>> import torch
        >>> moved = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5]))
        >>> task_ranks({"layer.weight": torch.zeros(5, 5)}, {"layer.weight": moved})
        {'layer': 3}
    """
    in_range("pearl", "(0, 1]", energy=energy)
    in_range("pearl", "[0, inf)", near=near)
    in_range("pearl", "[1, inf)", largest=largest)
    before, after = _matrices(reference), _matrices(tuned)
    if before.keys() != after.keys():
        raise BaseMismatch(f"only one of the two has {min(before.keys() ^ after.keys())}")
    found = {}
    for path, weight in before.items():
        if weight.shape != after[path].shape:
            raise BaseMismatch(
                f"{path} is {tuple(weight.shape)} before the task, {tuple(after[path].shape)} after it"
            )
        rank = energy_rank(after[path] - weight, energy * _distance_factor(weight, after[path], near))
        found[path] = rank if largest is None else min(rank, largest)
    return found


def energy_rank(change: Tensor, energy: float) -> int:
    """Return the smallest k with `sum_{i<=k} S_i^2 >= energy sum_i S_i^2`; 0 where the change is zero."""
    sums = torch.linalg.svdvals(change).square().cumsum(0)
    return int((sums < energy * sums[-1]).sum()) + 1 if sums[-1] else 0


def _distance_factor(before: Tensor, after: Tensor, near: float) -> float:
    """Return d / (d + near), and 1 where near is 0."""
    if near == 0:
        return 1.0
    distance, size = (float(torch.linalg.vector_norm(tensor)) for tensor in (after - before, before))
    return distance / (distance + near * size) if distance else 0.0


def _matrices(state: State) -> dict[str, Tensor]:
    """Return the weights of at least two dimensions as matrices in float64, by the path of their module."""
    named = dict(state.named_parameters()) if isinstance(state, nn.Module) else dict(state)
    weights = {k: v.detach() for k, v in named.items() if k.endswith("weight") and v.dim() > 1}
    paths = {key: key.removesuffix("_weight").removesuffix(".weight") for key in weights}
    return {paths[key]: value.double().flatten(1) for key, value in weights.items()}
