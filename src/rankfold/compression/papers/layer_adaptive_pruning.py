"""Layer-adaptive pruning: how sparse every weight becomes is the exact optimum of the measured distortion.

    delta_l(p) = mean_x ||f(x; W) - f(x; W with the fraction p of layer l's smallest |w| set to 0)||^2
    min over p of sum_l delta_l(p_l)   such that   sum_l n_l (1 - p_l) <= keep sum_l n_l

Xu et al. 2023. The distortions of single layers add up to that of all of them while they are moderate. Curves
are measured on a grid of G + 1 levels, the problem is solved by dynamic programming over the layers
(`linalg.allocate`), and every layer is pruned by magnitude at its level. The result is a stock model with
zeros.

G = 100 and a mean over outputs and examples are the paper's; `worst` takes the largest change of an example,
as its published commands do. Over several `rounds` the kept share falls as keep^(t / rounds), curves are
measured anew on the pruned model, and no layer gets back what it lost; the paper trains between the rounds,
which is for the caller to do, one call a round. A layer is never removed whole (p < 1). The budget is solved
in at most 10,000 units, rounded such that it holds. The official program may overshoot in its first layer.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...linalg import allocate
from ...statistics.calibrating import Progress
from ...statistics.watched import Watched
from ..distortion import Distortion
from ..job import targeted
from ..registry import compressor, compressor_named
from ..report import Row
from ..task import Task

UNITS = 10_000


@compressor(
    "layer-adaptive-pruning",
    title="Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks",
    year=2023,
    arxiv="2308.10438",
    code="Akimoto-Cris/RD_VIT_PRUNE",
    formula="min sum_l delta_l(p_l) such that sum_l n_l (1 - p_l) <= keep n",
    whole=True,
    layers=("linear", "convolution", "embedding", "attention"),
    example={"levels": 8},
)
def layer_adaptive_pruning(task: Task, *, levels: int = 100, rounds: int = 1, worst: bool = False) -> None:
    """Prune the targeted weights.

    Args:
        task: the model and a few calibration batches; every level of every weight is one pass over them.
        levels: G >= 2, of the grid of sparsities.
        rounds: at least 1.
        worst: measure the largest change of an example.

    Example:
        >>> import torch, rankfold as rf
        >>> model, inputs = (
        ...     torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)),
        ...     torch.randn(32, 8),
        ... )
        >>> _ = rf.compress(
        ...     model, "layer-adaptive-pruning", keep=0.5, data=[inputs], levels=8, progress=False
        ... )
        >>> sum(int((layer.weight != 0).sum()) for layer in model) <= 48
        True
    """
    if levels < 2 or rounds < 1:
        raise InvalidOption(
            f"layer-adaptive-pruning: levels must be at least 2 and rounds 1, not {levels} and {rounds}"
        )
    weights = targeted(task, compressor_named("layer-adaptive-pruning"))
    # In their own shapes: the matrix of a convolution whose channels are last is a copy.
    matrices = [weight.layer.stored().detach() for weight in weights]
    before = [matrix.clone() for matrix in matrices]
    taken = [0] * len(weights)
    try:
        for turn in range(1, rounds + 1):
            taken = _round(task, matrices, taken, task.keep ** (turn / rounds), levels, worst)
    except BaseException:
        for matrix, value in zip(matrices, before, strict=True):
            matrix.copy_(value)
        raise
    task.report.rows += [_row(weight, old) for weight, old in zip(weights, before, strict=True)]


@torch.no_grad()
def _round(
    task: Task, matrices: Sequence[Tensor], taken: Sequence[int], keep: float, levels: int, worst: bool
) -> list[int]:
    """Measure, choose and prune; return the levels."""
    change = Distortion(task.model, task.batches(), worst=worst)
    bar = Progress(task.progress, len(matrices), "distortions")
    curves = [
        _curve(matrix, start, levels, change, bar) for matrix, start in zip(matrices, taken, strict=True)
    ]
    bar.close()
    chosen = chosen_levels([m.numel() for m in matrices], curves, taken, levels, keep)
    for matrix, level in zip(matrices, chosen, strict=True):
        matrix.mul_(kept_mask(matrix, level, levels))
    return chosen


def _curve(matrix: Tensor, start: int, levels: int, change: Distortion, bar: Progress) -> list[float]:
    """Return the distortion at every level from `start` up to the last before all is gone."""
    dense, found = matrix.clone(), list[float]()
    try:
        for level in range(start, levels):
            matrix.copy_(dense * kept_mask(dense, level, levels))
            found.append(change() if level > start or start else 0.0)
    finally:
        matrix.copy_(dense)
    bar.step()
    return found


def kept_mask(matrix: Tensor, level: int, levels: int) -> Tensor:
    """Return where the fraction level / levels of the smallest entries is not, as zeros and ones."""
    removed = matrix.numel() * level // levels
    mask = torch.ones(matrix.numel(), dtype=matrix.dtype, device=matrix.device)
    order = matrix.abs().flatten().argsort(stable=True)
    mask[order[:removed]] = 0
    return mask.reshape(matrix.shape)


def chosen_levels(
    sizes: Sequence[int], curves: Sequence[Sequence[float]], starts: Sequence[int], levels: int, keep: float
) -> list[int]:
    """Return the levels of the smallest total distortion within a budget.

    Args:
        sizes: numbers in every weight.
        curves: distortion at each level from the weight's start on.
        starts: levels below which a weight may not fall.
        levels: of the grid.
        keep: share of all numbers that may remain.

    Raises:
        InvalidOption: even the highest levels leave more.
    """
    budget = int(keep * sum(sizes))
    if budget >= sum(size - size * start // levels for size, start in zip(sizes, starts, strict=True)):
        return list(starts)  # rounded to units it might not fit
    unit = max(1, -(-sum(sizes) // UNITS))
    costs, gains = [], []
    for size, curve, start in zip(sizes, curves, starts, strict=True):
        held = [size - size * level // levels for level in range(start, start + len(curve))]
        costs.append([-(-number // unit) for number in reversed(held)])
        gains.append([curve[-1] - value for value in reversed(curve)])
    if sum(row[0] for row in costs) > budget // unit:
        raise InvalidOption(
            f"keep={keep:g} is below what the highest of {levels} levels leaves; take more levels"
        )
    best = allocate(costs, gains, budget // unit, method="exact")
    assert all(a <= b for row in costs for a, b in pairwise(row))
    return [start + len(curve) - 1 - index for curve, start, index in zip(curves, starts, best, strict=True)]


def _row(weight: Watched, before: Tensor) -> Row:
    now = weight.layer.stored().detach()
    size = torch.linalg.vector_norm(before.float()).clamp(min=1e-30)
    error = float(torch.linalg.vector_norm((now - before).float()) / size)
    kept = int((now != 0).sum())
    return Row(
        weight.path, weight.layer.shape, None, kept, error, error, (), f"{kept:,} numbers are not zero"
    )
