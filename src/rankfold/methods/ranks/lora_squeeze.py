"""LoRA-Squeeze: train at a high rank and anneal it to the target by truncated decompositions.

    s B A = U S V^T,   B' = U_r (S_r / s)^(1/2),   A' = (S_r / s)^(1/2) V_r^T

Vulic et al. 2026. The three modes:

- Post-Squeeze: train at a high rank, then `rankfold.squeeze(model, rank)`, once.
- Cont-Squeeze: the same, and train on; with `optimizer=` its state follows.
- In-Squeeze, this rule: the rank begins at `times` the one asked for and is halved at equal intervals during
  training until it is down, the optimizer going on.

Every squeeze is exact through the QR decompositions of the factors, the product is never formed. First
moments are mapped as the gradients are, dB' = dB N^T and dA' = M^T dA where B' = B M and A' = N A; second
moments by the squares of the same coefficients, or with moments="reset" all are reset together with the
step count. s is alpha divided by the first rank, before and after. times = 4 and final = 0.25 are choices,
the paper's schedule varies.

Where a product is zero, as before the first step, its new A is drawn at random and the new B is zero, or
nothing could train any more. Start: the structure's and the initialiser's.

Deviation: exact and not randomised. With an initialiser whose start is subtracted from the base, the
product holds a part of the base, and what is dropped of that is missing from the weight.

Use it where a high rank is affordable while training and the adapter has to be small afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...linalg import Squeezed, squeeze_factors
from ...optim import reset, transform
from ..limits import in_range, one_of
from ..registry import ranks
from ..rules import DynamicRanks, Unit
from ..run import Run, TrainedPair


def first_rank(options: Mapping[str, float], rank: int) -> int:
    """Return the rank to begin with."""
    return math.ceil(options["times"] * rank)


@ranks(
    "lora-squeeze",
    largest=first_rank,
    title="LoRA-Squeeze: Simple and Effective Post-Tuning and In-Tuning Compression of LoRA Modules",
    year=2026,
    arxiv="2602.10993",
    formula="s B' A' = [s B A]_r at ranks r_source > ... > r_target during training",
)
@dataclass(kw_only=True)
class LoraSqueeze(DynamicRanks):
    """A rank that is halved during training.

    Args:
        times: the first rank as a multiple of the one asked for, at least 1.
        final: share of the training at the target rank, in [0, 1).
        moments: "transfer" or "reset".
    """

    times: float = 4.0
    final: float = 0.25
    moments: str = "transfer"
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)
    gated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        in_range("lora-squeeze", "[1, inf)", times=self.times)
        in_range("lora-squeeze", "[0, 1)", final=self.final)
        one_of("lora-squeeze", ("transfer", "reset"), moments=self.moments)

    def share(self, units: Sequence[Unit], rank: int) -> dict[str, int]:
        """Begin with the high rank, where the weight can hold it."""
        return {u.path: u.fitted(first_rank({"times": self.times}, rank)) for u in units}

    def check(self, run: Run) -> None:
        """Refuse a training that is too short for the squeezes."""
        count = len(self.stages(run))
        if run.total_steps is not None and (1 - self.final) * run.total_steps < count:
            raise InvalidOption(f"lora-squeeze: {run.total_steps} steps leave no room for {count} squeezes")

    def stepped(self, run: Run) -> None:
        """Squeeze where a stage ends."""
        rank = self.stages(run).get(run.step)
        for pair in run.pairs if rank is not None else ():
            if rank is not None and rank < pair.rank:
                self.squeeze(run, pair, rank)

    def stages(self, run: Run) -> dict[int, int]:
        """Return the step of every squeeze and the rank after it."""
        asked = int(run.asked_rank or 1)
        first = first_rank({"times": self.times}, asked)
        count = math.ceil(math.log2(first / asked))
        length = (1 - self.final) * int(run.total_steps or count) / max(count, 1)
        return {int(k * length): max(asked, math.ceil(first / 2**k)) for k in range(1, count + 1)}

    def squeeze(self, run: Run, pair: TrainedPair, rank: int) -> None:
        """Truncate a product; the optimizer's state follows."""
        squeezed = squeeze_factors(pair.up, pair.down, rank)
        if self.moments == "transfer":
            up_map, down_map = squeezed.up_map.to(pair.up), squeezed.down_map.to(pair.down)
            transform(run.optimizer, pair.up, lambda m: m @ down_map.mT, lambda v: v @ down_map.mT**2)
            transform(run.optimizer, pair.down, lambda m: up_map.mT @ m, lambda v: up_map.mT**2 @ v)
        else:
            for factor in (pair.up, pair.down):
                reset(run.optimizer, factor)
                transform(run.optimizer, factor, _cut(factor is pair.up, rank))
        pair.pair.owner.resize(squeezed.up, revived(run, pair, squeezed))


def _cut(columns: bool, rank: int) -> Callable[[Tensor], Tensor]:
    """Return the function that cuts a moment to the rank."""
    return (lambda m: m[:, :rank]) if columns else (lambda m: m[:rank])


def revived(run: Run, pair: TrainedPair, squeezed: Squeezed) -> Tensor:
    """Return A' (r, in) with random rows, Kaiming uniform, where a term is zero."""
    down = squeezed.down
    dead = down.abs().sum(1, keepdim=True) == 0
    bound = 1 / math.sqrt(down.shape[1])
    drawn = bound * (2 * torch.rand(down.shape, generator=run.generator(pair.key, "revived")) - 1)
    return torch.where(dead, drawn.to(down), down)
