"""Finding the sub-matrix of a weight that matters, while training runs: what LoSiA does around every step.

    I = |W G - (W G)^2 / 2|,   E = b1 E + (1 - b1) I,   U = b2 U + (1 - b2) |I - E|,   Q = E U

Wang et al. 2025. Time has slots of T steps; in slot s the weights of block s mod D, of D, record Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers import StructuredLayer
from ..optim import reset
from ..weights import Selection
from .capacity import blocks_of
from .importance import watch_gradients, weight_gradient
from .limits import in_range, one_of
from .processes import average_gradients
from .rules import Dynamics
from .run import Run
from .selected import selections
from .sensitivity import smoothed

IMPORTANCES = ("mixed", "first", "second")
_STILL = 2  # steps after a localisation in which nothing moves


@dataclass(kw_only=True)
class Localisation(Dynamics):
    """Every weight's sub-matrix is found again, block after block.

    Args:
        interval: T, steps of a slot, at least 1.
        beta1, beta2: of the averages, in [0, 1).
        importance: "mixed" takes I as above, "first" |W G|, "second" (W G)^2 / 2.
        asynchronous: one block records in every slot; else all do in the first of every D slots.
    """

    owner: ClassVar[str] = "losia"  # whose options these are, for sentences

    interval: int = 100
    beta1: float = 0.85
    beta2: float = 0.85
    importance: str = "mixed"
    asynchronous: bool = True

    def __post_init__(self) -> None:
        in_range(self.owner, "[1, inf)", interval=self.interval)
        in_range(self.owner, "[0, 1)", beta1=self.beta1, beta2=self.beta2)
        one_of(self.owner, IMPORTANCES, importance=self.importance)

    def watch(self, run: Run) -> list[RemovableHandle]:
        """Form the whole gradients of the weights that are recording, and of no other."""
        scope, turns = run.scope, turns_of(run)

        def arrived(path: str, layer: StructuredLayer, x: Tensor, gradient: Tensor) -> None:
            memory, new = run.memory(path, scope), weight_gradient(layer, x, gradient)
            memory["gradient"] = memory["gradient"] + new if "gradient" in memory else new

        return watch_gradients(run, arrived, lambda path: self.records(turns, path, run.step))

    def records(self, turns: dict[str, int], path: str, step: int) -> bool:
        """Say whether a weight records in the slot of a step."""
        slot = step // self.interval % (1 + max(turns.values()))
        return slot == (turns[path] if self.asynchronous else 0)

    def gradients_ready(self, run: Run) -> None:
        """Record, and remember where weights stand whose rate is climbing."""
        turns = turns_of(run)
        for path, selection in selections(run).items():
            memory = run.memory(path)
            if self.records(turns, path, run.step):
                self.record(run, path, selection)
            if (share := self.share_of_rate(run, path)) < 1:
                memory["share"], memory["before"] = share, selection.values.value.detach().clone()

    def record(self, run: Run, path: str, selection: Selection) -> None:
        """Let the averages of a weight see the gradient of this step."""
        memory = run.memory(path)
        gradient = as_stepped(selection, memory.pop("gradient", None))
        if bool(gradient.isfinite().all()):
            product = run.expressions[path].dense().to(gradient) * gradient
            terms = {"first": product, "second": product.square() / 2}
            terms["mixed"] = product - terms["second"]
            smoothed(memory, "importance", terms[self.importance].abs(), self.beta1, self.beta2)

    def share_of_rate(self, run: Run, path: str) -> float:
        """Return which share of the scheduled rate a weight has in the step about to be taken."""
        localised = run.memory(path).get("localised")
        if localised is None:
            return 1.0
        since = run.step - int(localised)
        return 0.0 if since < _STILL else min(1.0, since / self.interval)

    def stepped(self, run: Run) -> None:
        """Shorten the steps of weights whose rate is climbing, and localise those whose slot has ended."""
        turns = turns_of(run)
        for path, selection in selections(run).items():
            memory, values = run.memory(path), selection.values.value
            if "before" in memory:
                values.copy_(memory.pop("before").to(values).lerp(values, memory.pop("share")))
            if run.step % self.interval == 0 and self.records(turns, path, run.step - 1):
                localise(run, path, selection)


def turns_of(run: Run) -> dict[str, int]:
    """Return which turn every weight has: the number of its block among those that are adapted."""
    blocks = blocks_of(selections(run))
    names = list(dict.fromkeys(blocks.values()))
    return {path: names.index(block) for path, block in blocks.items()}


def as_stepped(selection: Selection, gradient: Tensor | None) -> Tensor:
    """Return a weight's gradient (out, in), averaged over processes and scaled as the optimizer gets it.

    A clip of gradients or a gradient scaler acts after the hooks that see them; the packed gradient tells by
    how much.
    """
    values = selection.values.value
    whole = nn.Parameter(values.new_empty(selection.shape))
    whole.grad = None if gradient is None else gradient.to(values)
    average_gradients([whole])
    if whole.grad is None or values.grad is None:
        return torch.zeros_like(whole)
    part = whole.grad.flatten()[selection.positions()].view_as(values)
    size = part.square().sum()
    return whole.grad * torch.where(size == 0, 1, (part * values.grad).sum() / size)


def localise(run: Run, path: str, selection: Selection) -> None:
    """Let the sub-matrix with the largest score train from now on, from moments of zero."""
    memory = run.memory(path)
    score = memory.pop("importance.mean", 0.0) * memory.pop("importance.spread", 0.0)
    if not isinstance(score, Tensor) or not bool(score.any()):  # nothing was seen in its slot
        return
    selection.select(*best_rectangle(score, *(leaf.shape[0] for leaf in selection.support)))
    reset(run.optimizer, selection.values.value, steps=False)
    memory["localised"] = run.step


def best_rectangle(score: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return increasing rows (height,) and columns (width,), the best of three greedy choices.

    They are the rows and the columns with the largest sums; these rows, and the columns with the largest sums
    over them; and these columns, and the rows with the largest sums over them.

    Example:
        >>> best_rectangle(torch.tensor([[0.0, 3.0], [1.0, 4.0]]), 1, 1)
        (tensor([1]), tensor([1]))
    """
    rows, columns = _largest(score.sum(1), height), _largest(score.sum(0), width)
    choices = [
        (rows, columns),
        (rows, _largest(score[rows].sum(0), width)),
        (_largest(score[:, columns].sum(1), height), columns),
    ]
    sums = [float(score[chosen[0]][:, chosen[1]].sum()) for chosen in choices]
    return choices[sums.index(max(sums))]


def _largest(sums: Tensor, count: int) -> Tensor:
    return sums.topk(count).indices.sort().values
