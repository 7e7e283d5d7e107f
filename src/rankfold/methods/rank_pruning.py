"""Trained weights that are cut to their leading singular values, and factored at the end (TRP)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..linalg import polar_factor, truncated_svd
from ..linalg.checks import exact_dtype
from ..weights import Dense, Factoring
from .rules import Dynamics
from .run import Run
from .stages import parameters_of, staged, take_place


@dataclass(kw_only=True)
class TrainedRankPruning(Dynamics):
    """The cuts; its options are those of `trp`.

    Args:
        interval: m, steps from one cut to the next.
        energy: share of the squared singular values that a cut keeps; 1 cuts nothing.
        nuclear: factor of the nuclear norm's subgradient.
        threshold: of the singular values that the factors at the end keep; None keeps the weight dense.
    """

    interval: int
    energy: float
    nuclear: float
    threshold: float | None

    def gradients_ready(self, run: Run) -> None:
        """Add the subgradient of the nuclear norm on the steps that begin with a cut."""
        if self.nuclear == 0 or run.step % self.interval:
            return
        for path, part, weight in _dense(run):
            direction = run.memory(path).pop("subgradient", None)
            direction = polar_factor(_seen(part, weight)) if direction is None else direction
            if weight.grad is not None:
                weight.grad += self.nuclear * part.unseen(direction)

    def stepped(self, run: Run) -> None:
        """Cut the weights before every m-th step that comes."""
        if self.energy == 1 or run.step % self.interval or run.step == run.total_steps:
            return
        for path, part, weight in _dense(run):
            left, values, right = cut(_seen(part, weight), self.energy)
            weight.copy_(part.unseen(left * values @ right))
            if self.nuclear:
                run.memory(path)["subgradient"] = left @ right

    def finish(self, run: Run) -> None:
        """Hand the factors over, if the training is at its end."""
        if self.threshold is None or run.step < (run.total_steps or 0):
            return
        for _, part, weight in list(_dense(run)):
            matrix = _seen(part, weight)
            left, values, right = truncated_svd(matrix, min(matrix.shape))
            rank = max(1, int((values > self.threshold).sum()))
            root = values[:rank].sqrt()
            factors = left[:, :rank] * root, root[:, None] * right[:rank]
            part.split(*(factor.to(weight.dtype) for factor in factors))
            take_place(run, [weight], parameters_of(part))


def _dense(run: Run) -> Iterator[tuple[str, Factoring, Tensor]]:
    for path, part in staged(run, Factoring).items():
        if isinstance(part.now, Dense) and part.now.trainable:
            yield path, part, part.now.value


def _seen(part: Factoring, weight: Tensor) -> Tensor:
    """Return the matrix that is decomposed, in float32 or better."""
    return part.seen(weight).to(exact_dtype(weight))


def cut(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fewest leading singular triplets that keep a share of the sum of squared singular values."""
    left, values, right = truncated_svd(matrix, min(matrix.shape))
    kept = values.square().cumsum(0)
    rank = min(len(values), 1 + int((kept < energy * kept[-1]).sum()))
    return left[:, :rank], values[:rank], right[:rank]
