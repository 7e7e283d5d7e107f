"""ARD-LoRA: a trained amount per weight opens its terms one after the other, under l1 and total variation.

    dW = s B diag(g) A,   g_i = clamp(r0 a - (i - 1), 0, 1),   i = 1..R
    L = L_task + lambda sum_l (|a_l| + beta |a_l(t) - a_l(t - 1)|),   a_l >= 0

Shinwari and Usama 2025. From the abstract: a trained factor a per layer and head sets the rank round(r0 a),
penalised by its size and by its variation over time. **The gates are a reconstruction.** They sum to r0 a
exactly, and a whole r0 a is exactly a LoRA of that rank; where r0 a is whole, the gates on both sides of
the edge pass their gradient, so that the rank can rise and fall from there. Both penalties act through the
gradient, that of the variation against the last step's direction; after a step a is clamped to [0, R / r0].
R is `most` times the rank asked for, r0; alpha is divided by R. lambda = 1e-3, beta = 0.1 and most = 2 are
guesses.

Terms that stay closed are dropped by `rankfold.squeeze` after training. Start: the structure's and the
initialiser's: a = 1 where the product is zero; where the start is subtracted from the base or moves it, all
R terms are open.

Deviations: one amount per weight and not per head; amounts and factors are trained in the same step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...weights import Dense, Leaf
from ..limits import in_range
from ..registry import ranks
from ..rules import DynamicRanks, Unit
from ..run import Run, TrainedPair
from ..site import Place


class Ramp(Leaf):
    """Gates `clamp(r0 a - (i - 1), 0, 1)`, i = 1..R, of one trained amount a.

    Args:
        amount: leaf of shape (1,).
        reference: r0, number of terms that a = 1 opens.
        rank: R.
        name: of the result.
    """

    stored = False

    def __init__(self, amount: Dense, reference: float, rank: int, name: str) -> None:
        super().__init__(name, (rank,))
        self.amount, self.reference = amount, reference

    @property
    def trainable(self) -> bool:
        """Whether the amount is trained."""
        return self.amount.trainable

    def source(self) -> Tensor:
        """Return the gates (R,), of sum r0 a."""
        amount = self.amount.tensor()
        below = torch.arange(self.shape[0], dtype=amount.dtype, device=amount.device)
        return (self.reference * amount - below).clamp(0, 1)


def widest(options: Mapping[str, float], rank: int) -> int:
    """Return R."""
    return math.ceil(options["most"] * rank)


@ranks(
    "ard-lora",
    largest=widest,
    status="experimental",
    title="ARD-LoRA: Dynamic Rank Allocation for Parameter-Efficient Fine-Tuning of Foundation Models with "
    "Heterogeneous Adaptation Needs",
    year=2025,
    arxiv="2506.18267",
    formula="g_i = clamp(r0 a - (i - 1), 0, 1), L + lambda (|a| + beta |a(t) - a(t-1)|)",
)
@dataclass(kw_only=True)
class ArdLora(DynamicRanks):
    """One trained amount of rank per weight.

    Args:
        penalty: lambda, at least 0.
        variation: beta, at least 0.
        most: R as a multiple of the rank asked for, at least 1.
    """

    penalty: float = 1e-3
    variation: float = 0.1
    most: float = 2.0
    opens: ClassVar[bool] = False  # the penalty would keep an amount of zero there

    def __post_init__(self) -> None:
        in_range("ard-lora", "[0, inf)", penalty=self.penalty, variation=self.variation)
        in_range("ard-lora", "[1, inf)", most=self.most)

    def share(self, units: Sequence[Unit], rank: int) -> dict[str, int]:
        """Hold R terms, where the weight can."""
        return {u.path: u.fitted(widest({"most": self.most}, rank)) for u in units}

    def gate(self, site: Place, name: str, rank: int, start: str) -> Leaf:
        """Return the ramp of a product."""
        opened = 1.0 if start == "zero" else self.most
        return Ramp(site.trained(site.zeros(1) + opened, name), rank / self.most, rank, f"{name}.ramp")

    def gradients_ready(self, run: Run) -> None:
        """Add the penalties' gradients."""
        for pair in run.pairs:
            amount, memory = amount_of(pair), run.memory(pair.key)
            if amount.grad is None:
                continue
            last = memory.get("amount", amount.detach())
            memory["amount"] = amount.detach().clone()
            amount.grad += self.penalty * (1 + self.variation * (amount - last).sign())

    def stepped(self, run: Run) -> None:
        """Keep the amounts within what the gates can show."""
        for pair in run.pairs:
            amount_of(pair).clamp_(0, self.most)


def amount_of(pair: TrainedPair) -> Tensor:
    """Return the trained amount a of a product, (1,)."""
    ramp = pair.pair.gate
    assert isinstance(ramp, Ramp)
    return ramp.amount.value
