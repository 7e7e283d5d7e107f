"""LoFT: gradient and both moments of each factor are those of the weight, seen through the other factor.

For A, with P = s B (out, r) the factor that stays (for B: everything transposed, P = s A^T), every step:

    H = (P^T P + d I)^-1,   g = H g_A                  P g = P_B G, the gradient of W projected on P's columns
    R = H P^T P_old,   M <- R M,   S_j <- R S_j R^T                  the moments follow P into new coordinates
    M <- b1 M + (1 - b1) g,   S_j <- b2 S_j + (1 - b2) g_j g_j^T              j: column; M (r, in), S_j (r, r)
    U_ij = (P M)_ij / (1 - b1^t) / (sqrt(p_i^T S_j p_i / (1 - b2^t)) + eps)                    p_i: row i of P
    A <- A - lr H P^T U,   so that W moves by -lr P_B U

Tastan et al. 2025. The states of both factors advance at every step; B moves at even steps (the first too), A
at odd ones. At r = out = in the weight follows AdamW exactly, and nothing depends on which of the factors
(B C, C^-1 A) a product is made of. eps = 1e-4 is the paper's; None takes the optimizer's, as are the learning
rate, betas and decay, which acts on the factor that moves. Start: as the structure's; while B = 0 the state
of A is zero. s is the structure's and drops out.

U is made in blocks of rows, used and dropped: the full-size direction is never stored. State: r (out + in)
numbers of M and of P_old each, r^2 (out + in) of S. `diagonal` keeps the diagonals of S_j only, r (out + in)
numbers, for ranks above 64 or so, and then the properties above are approximations.

Deviations: d is 1e-8 times the mean eigenvalue (public code adds 1e-6 and 1e-8, whatever the factor's size).
Public code transposes R in one of the two factors of the transport of S, which is wrong by the property at
full rank and cannot be seen with betas of zero; it also decays without the learning rate. `max_norm` clips
by the norm of P g over the factors that move, as the paper does. Dropout on the change's input is refused.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...weights import Weight
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run, TrainedPair
from .owned import (
    EXCLUDED,
    Gradients,
    check_numbers,
    check_run,
    clip,
    gradients_of,
    gram,
    move,
    options,
    refuse_dropout,
    wide,
)

_BLOCK = 2**20  # entries of the full-size direction that are alive at once


class Side(NamedTuple):
    """One factor as the method sees it, that of the output side transposed.

    Attributes:
        name: up or down.
        partner: P, (k, r), the scaled other factor.
        inverse: H, (r, r).
        gradient: g, (r, n).
    """

    name: str
    partner: Tensor
    inverse: Tensor
    gradient: Tensor


@dynamics(
    "loft",
    pairs="terms",
    noise=False,
    owns_step=True,
    gates=False,
    excludes=EXCLUDED,
    title="LoFT: Low-Rank Adaptation That Behaves Like Full Fine-Tuning",
    year=2025,
    arxiv="2505.21289",
    code="tnurbek/loft",
    formula="A <- A - lr H P^T U, U: Adam's direction of P g, moments moved by R = H P^T P_old",
)
@dataclass(kw_only=True)
class Loft(Dynamics):
    """Alternating steps with moments of the weight.

    Args:
        eps: added to the root of the second moment, at least 0; None takes the optimizer's.
        damping: added to Gram matrices, relative to their mean eigenvalue, at least 0.
        diagonal: keep only the diagonals of the second moments S_j.
        max_norm: the most that the norm of all projected gradients may be, positive; None does not clip.
    """

    eps: float | None = 1e-4
    damping: float = 1e-8
    diagonal: bool = False
    max_norm: float | None = None

    def __post_init__(self) -> None:
        check_numbers("loft", self.max_norm, damping=self.damping, eps=self.eps)

    def suits(self, path: str, expression: Weight) -> None:
        """Refuse dropout."""
        refuse_dropout("loft", path, expression)

    def check(self, run: Run) -> None:
        """Refuse what Adam's step of a product cannot follow."""
        check_run("loft", run)

    def gradients_ready(self, run: Run) -> None:
        """Advance all moments, move one factor of every product, and leave the optimizer none."""
        found = [(pair, gradients_of(run, pair)) for pair in run.pairs]
        sides = [(pair, self.sides(gradients)) for pair, gradients in found if gradients is not None]
        moving = run.step % 2  # of (up, down)
        norms = (projected_norm(both[moving]) for _, both in sides)
        factor = clip(norms, self.max_norm)
        for pair, both in sides:
            memory = run.memory(pair.key)
            memory["steps"] = memory.get("steps", 0) + 1
            for side in both:
                self.advance(run, pair, side._replace(gradient=factor * side.gradient))
            self.move(run, pair, both[moving])

    def sides(self, gradients: Gradients) -> tuple[Side, Side]:
        """Return both factors with their projected gradients."""
        to_up, to_down = gradients.scale * gradients.down.mT, gradients.scale * gradients.up
        up, down = gram(to_up, self.damping).inverse, gram(to_down, self.damping).inverse
        return (
            Side("up", to_up, up, up @ gradients.to_up.mT),
            Side("down", to_down, down, down @ gradients.to_down),
        )

    def advance(self, run: Run, pair: TrainedPair, side: Side) -> None:
        """Carry a factor's moments into the coordinates of its partner and add the gradient."""
        numbers, dtype = options(run, _factor(pair, side.name)), wide(pair.up)
        gradient, memory = side.gradient.to(dtype), run.memory(pair.key)
        kept = memory.get(side.name)
        if kept is None:
            mean, square = torch.zeros_like(gradient), self.products(torch.zeros_like(gradient))
        else:
            old = kept["partner"].to(side.partner)
            turn = (side.inverse @ (side.partner.mT @ old)).to(dtype)
            mean, square = turn @ kept["mean"].to(gradient), self.turned(kept["square"].to(gradient), turn)
        beta, second_beta = numbers["betas"]
        memory[side.name] = {
            "mean": mean.lerp_(gradient, 1 - beta),
            "square": square.lerp_(self.products(gradient), 1 - second_beta),
            "partner": side.partner.to(dtype),
        }

    def products(self, gradient: Tensor) -> Tensor:
        """Return g_j g_j^T for every column, (n, r, r); or their diagonals, (r, n)."""
        return gradient.square() if self.diagonal else gradient.mT[:, :, None] * gradient.mT[:, None, :]

    def turned(self, square: Tensor, turn: Tensor) -> Tensor:
        """Return R S_j R^T for every column; or its diagonal, were S_j diagonal."""
        return turn.square() @ square if self.diagonal else turn @ square @ turn.mT

    def move(self, run: Run, pair: TrainedPair, side: Side) -> None:
        """Step one factor along the projection of the full-size direction."""
        memory, factor = run.memory(pair.key), _factor(pair, side.name)
        numbers = options(run, factor)
        corrections = tuple(1 - beta ** memory["steps"] for beta in numbers["betas"])
        eps = numbers["eps"] if self.eps is None else self.eps
        step = side.inverse @ self.projected(memory[side.name], corrections, eps).to(side.inverse)
        move(factor, step.mT if side.name == "up" else step, numbers["lr"], numbers["weight_decay"])

    def projected(self, state: dict[str, Any], corrections: tuple[float, ...], eps: float) -> Tensor:
        """Return P^T U (r, n), making U (k, n) block by block of its rows."""
        mean, square = state["mean"], state["square"]
        flat = square if self.diagonal else square.flatten(1).mT
        total = torch.zeros_like(mean)
        for rows in state["partner"].split(max(1, _BLOCK // mean.shape[1])):
            pairs = rows.square() if self.diagonal else (rows[:, :, None] * rows[:, None, :]).flatten(1)
            size = (pairs @ flat).clamp_min_(0).div_(corrections[1]).sqrt_().add_(eps)
            total += rows.mT @ (rows @ mean / corrections[0]).div_(size)
        return total


def projected_norm(side: Side) -> Tensor:
    """Return |P g|_F."""
    return ((side.partner.mT @ side.partner @ side.gradient) * side.gradient).sum().clamp_min(0).sqrt()


def _factor(pair: TrainedPair, name: str) -> Tensor:
    return pair.up if name == "up" else pair.down
