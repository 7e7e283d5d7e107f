"""PRILoRA: ranks grow linearly with depth, and the factor that meets the input is pruned during training.

    r_l = round(r_s + (r_f - r_s) l / (L - 1)),   l = 0..L-1
    q_j <- beta q_j + (1 - beta) ||X_:j||,   every n steps: the smallest |A_ij| q_j of every row i <- 0

Benedek and Wolf 2024. l is a weight's block, L their number; r_s = r/2 and r_f = 3r/2 (4 and 12 in the
paper, r = 8) keep the mean at the rank r that was asked for, up to rounding to multiples and to what a
weight can hold; no weight gets less than one multiple, and with one block all get the mean. A (r, in), X the
inputs of a step (tokens, in), gradient accumulation included. n = 40; the share of half, beta = 0.9 and that
rows are compared within themselves are not confirmed. Pruned entries may grow again until the next time;
their moments stay, as in LoRA trained by Adam otherwise. Where B = 0, pruning changes nothing. alpha is
divided by r for all weights, so that the scaling is the same at every depth.

prune=0 leaves the ranks and works for every structure that has one. Otherwise whatever meets the input is
pruned, as the structure says: A of two factors, the vectors of reflections (hra), one row per reflection.
Where the start of the factors is subtracted from the base, the start's entries are set to zero with A's, so
that the pruned part stays in the base and the function changes only by what was learned there. Weights whose
input cannot be seen are not pruned: embeddings, which look rows up, and the output projection of
nn.MultiheadAttention. Several processes add up their activities in every step, so that they prune alike; all
of them must meet the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...layers import StructuredLayer, Target
from ...layers.targets import candidates
from ...statistics.rows import inputs_of
from ...weights import Leaf, Weight
from ..limits import in_range
from ..processes import processes
from ..registry import ranks
from ..rules import DynamicRanks, Unit
from ..run import Run


def largest_rank(options: Mapping[str, Any], rank: int) -> int:
    """Return the most that one weight may get."""
    return round(float(max(options["first"], options["last"])) * rank)


@ranks(
    "prilora",
    largest=largest_rank,
    entries=lambda options: bool(options["prune"]),
    title="PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation",
    year=2024,
    arxiv="2401.11316",
    formula="r_l linear in depth; every n steps the smallest |A_ij| ||X_:j|| of every row of A <- 0",
)
@dataclass(kw_only=True)
class PRILoRA(DynamicRanks):
    """Ranks by depth, and pruning by magnitude times activity.

    Args:
        first: rank of the first block as a multiple of the asked one, positive.
        last: rank of the last block, likewise.
        prune: share of every row that is set to zero, in [0, 1); 0 prunes nothing.
        interval: n, steps between two prunings, at least 1.
        beta: of the moving average of activities, in [0, 1).
    """

    first: float = 0.5
    last: float = 1.5
    prune: float = 0.5
    interval: int = 40
    beta: float = 0.9
    gated: ClassVar[bool] = False
    opens: ClassVar[bool] = False
    on_pairs: ClassVar[bool] = False
    alpha_over: ClassVar[str] = "asked"

    def __post_init__(self) -> None:
        in_range("prilora", "(0, inf)", first=self.first, last=self.last)
        in_range("prilora", "[1, inf)", interval=self.interval)
        in_range("prilora", "[0, 1)", prune=self.prune, beta=self.beta)

    def share(self, units: Sequence[Unit], rank: int) -> dict[str, int]:
        """Share ranks out by depth."""
        # Exact halves, which are rounded to even ones, keep the mean.
        return {unit.path: unit.fitted(round(rank * self.times(unit), 9)) for unit in units}

    def times(self, unit: Unit) -> float:
        """Return the multiple of the asked rank at a weight's depth."""
        if unit.blocks == 1:
            return (self.first + self.last) / 2
        return self.first + (self.last - self.first) * unit.depth / (unit.blocks - 1)

    def watch(self, run: Run) -> Sequence[RemovableHandle]:
        """Sum up the squares of what every pruned weight meets while gradients are taken."""
        if not self.prune:
            return ()
        return [
            target.module.register_forward_pre_hook(_adding(run, path, target, layer), with_kwargs=True)
            for path, target, layer in _watched(run)
        ]

    def gradients_ready(self, run: Run) -> None:
        """Let the activities follow the inputs of this step."""
        for path in run.expressions:
            memory = run.memory(path)
            squares = memory.pop("squares", None)
            if squares is None:
                continue
            if processes()[1] > 1:
                torch.distributed.all_reduce(squares)
            if squares.isfinite().all():
                activity = memory.get("activity", torch.zeros_like(squares))
                memory["activity"] = self.beta * activity + (1 - self.beta) * squares.sqrt()

    def stepped(self, run: Run) -> None:
        """Prune every n steps."""
        if not self.prune or run.step % self.interval:
            return
        for path, expression in run.expressions.items():
            activity: Tensor | None = run.memory(path).get("activity")
            if activity is not None:
                for leaf, axis in expression.entries():
                    prune(expression, leaf, axis, activity, self.prune)


def prune(expression: Weight, leaf: Leaf, axis: int, activity: Tensor, share: float) -> None:
    """Set the share of every row that matters least to zero, in a leaf and in the start that is subtracted.

    Args:
        expression: that holds the leaf.
        leaf: a matrix with one axis of input channels.
        axis: which one.
        activity: q (in,).
        share: in [0, 1).
    """
    values = leaf.tensor().detach()
    least = pruned(values.movedim(axis, 1), activity.to(values), share).movedim(1, axis)
    values[least] = 0
    for start in expression.leaves():
        if start.name == f"{leaf.name}.start":
            start.tensor()[least] = 0


def pruned(rows: Tensor, activity: Tensor, share: float) -> Tensor:
    """Return which entries of every row have the smallest `|A_ij| q_j`, the same number in each.

    Of equal ones the earlier go.

    Example:
        >>> pruned(torch.tensor([[1.0, -1.0, 3.0, 2.0]]), torch.tensor([1.0, 2.0, 0.1, 2.0]), 0.5)
        tensor([[ True, False,  True, False]])
    """
    count = int(share * rows.shape[1])
    least = (rows.abs() * activity).argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, least, True)


# The inputs -------------------------------------------------------------------------------------------


def _watched(run: Run) -> Iterator[tuple[str, Target, StructuredLayer]]:
    """Yield every module whose input an adapted weight meets, tied ones too, with the weight's path."""
    paths = {id(expression): path for path, expression in run.expressions.items()}
    for target in candidates(run.model):
        layer = getattr(target.module, target.part) if target.part else target.module
        if not isinstance(layer, StructuredLayer) or layer.looked_up or target.part == "out_proj":
            continue
        adapters = (layer.lender or layer).adapters
        path = paths.get(id(adapters[run.name])) if run.name in adapters else None
        if path is not None:
            yield path, target, layer


def _adding(
    run: Run, path: str, target: Target, layer: StructuredLayer
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    scope, width = run.scope, layer.shape[1]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not target.module or not torch.is_grad_enabled():
            return  # a layer may call its original, which has the same hooks; validation does not count
        memory = run.memory(path, scope)
        for x in _inputs(target, args, kwargs):
            rows = inputs_of(layer, x.detach())
            # A convolution's groups meet channels of their own, one after another.
            squares = rows.reshape(-1, width).float().square().sum(0)
            memory["squares"] = squares if "squares" not in memory else memory["squares"] + squares

    return hook


def _inputs(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return what a weight meets: of an attention module's packed projection, query, key and value."""
    if not target.part:
        return [args[0] if args else next(iter(kwargs.values()))]
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    return [given[name] for name in ("query", "key", "value")]
