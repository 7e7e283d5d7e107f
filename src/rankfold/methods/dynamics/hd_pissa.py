"""HD-PiSSA: the steps of all processes, each on a band of its own, are summed into the shared weight.

    after every step:   W <- W + s sum_n (B_n' A_n' - B_n A_n),   then B_n' = B_n, A_n' = A_n again
                        = W + s sum_n [dB_n, B_n] [A_n'; dA_n],   d: the change of a factor in the step

Wang et al. 2025. B_n (out, r), A_n (r, in) are the bands of process n (the initialiser hd-pissa), B_n' and
A_n' what its optimizer made of them with the gradient of its own batch. Factors never move for longer than a
step, so the forward is W x, and the optimizer's moments, which stay, are those of gradients at fixed
directions. One step of N processes has rank 2 r N, against 2 r of data-parallel training. Start: as the
structure's. With factors from another start (pissa, olora, ...) all processes have the same directions, and
with one process a step is that of a fixed pair.

The processes are those of torch.distributed: each adapts, trains and attaches by itself, with batches of its
own, and must take the same number of steps. **Do not wrap the model in DistributedDataParallel**, which
would average the gradients of different bands. Whatever else is trained (a head, a magnitude) gets the mean
of the processes' gradients before the step and starts as in the first process, as it would there. Every
process holds all of W in float32 or better, and saves the same weight beside its own band; to continue, each
loads its own. Communication is 4 N r (out + in) numbers a weight and step: fixed factors are sent along, as
in the official code.

Deviations: gradients are those of the factors themselves; the official code adds 1e-16 times the product to
the output and multiplies the gradients by 1e16. Weight decay on the factors is refused, because it would take
the same part of W away in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import Incompatible
from ..processes import average_gradients, copy_from_first, gathered
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run, TrainedPair


@dynamics(
    "hd-pissa",
    pairs="terms",
    moves_base=True,
    gates=False,
    excludes=(
        "relora",
        "periodic-lora",
        "switchlora",
        "refactorisation",
        "shrink-perturb",
        "shrink-perturb-all",
    ),
    init=("hd-pissa", {}),
    title="HD-PiSSA: High-Rank Distributed Orthogonal Adaptation",
    year=2025,
    arxiv="2505.18777",
    code="MuLabPKU/HD-PiSSA",
    formula="W <- W + s sum_n (B_n' A_n' - B_n A_n) after every step, then B_n, A_n again",
)
@dataclass(kw_only=True)
class HdPissa(Dynamics):
    """Steps that are summed over processes and moved into the weight."""

    def check(self, run: Run) -> None:
        """Refuse weight decay on the factors."""
        factors = [factor for pair in run.pairs for factor in (pair.up, pair.down)]
        if any(run.group(factor).get("weight_decay") for factor in factors):
            raise Incompatible(
                "hd-pissa puts its factors back after every step, and weight decay on them would take the "
                "same part of the weight away each time; use weight_decay=0"
            )

    def begin(self, run: Run) -> None:
        """Remember the start of factors whose expression does not hold it; let all else start alike."""
        copy_from_first(list(_others(run)))
        for pair in run.pairs:
            for name, factor in (("up", pair.up), ("down", pair.down)):
                if _held(pair, name) is None:
                    run.memory(pair.key)[name] = factor.detach().clone()

    def gradients_ready(self, run: Run) -> None:
        """Average the gradients of everything that is no factor of a band."""
        average_gradients(list(_others(run)))

    def stepped(self, run: Run) -> None:
        """Move the steps of all processes into the base, and put the factors back."""
        for pair in run.pairs:
            up, down = (_start(run, pair, name) for name in ("up", "down"))
            left = torch.cat([pair.up - up, up], 1)
            right = torch.cat([pair.down, pair.down - down])
            pair.move_into_base(pair.scale * (gathered(left, 1) @ gathered(right, 0)))
            pair.up.copy_(up)
            pair.down.copy_(down)


def _held(pair: TrainedPair, name: str) -> Tensor | None:
    """Return the start of a factor that the expression subtracts, or None."""
    leaf = getattr(pair.pair, name)
    starts = [other for other in pair.expression.leaves() if other.name == f"{leaf.name}.start"]
    return starts[0].tensor() if starts else None


def _start(run: Run, pair: TrainedPair, name: str) -> Tensor:
    held = _held(pair, name)
    start: Tensor = run.memory(pair.key)[name] if held is None else held
    return start.to(pair.up)


def _others(run: Run) -> Iterator[Tensor]:
    factors = {id(factor) for pair in run.pairs for factor in (pair.up, pair.down)}
    for group in run.optimizer.param_groups:
        yield from (p for p in group["params"] if p.requires_grad and id(p) not in factors)
