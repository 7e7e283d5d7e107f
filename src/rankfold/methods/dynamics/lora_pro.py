"""LoRA-Pro: factors move so that the weight follows its own gradient as closely as a low-rank change can.

    an update (gA, gB) moves W along   g~ = s B gA + s gB A         G = dL/dW, never formed; g_A, g_B: of A, B
    closest to G:   gA = (1/s^2) (B^T B)^-1 g_A + X A,   gB = (1/s^2) (I - P_B) g_B (A A^T)^-1 - B X
                    g~ = G - (I - P_B) G (I - P_A) whatever X (r, r) is;  P_B = B (B^T B)^-1 B^T, likewise P_A
    X of the least |gA - g_A|^2 + |gB - g_B|^2:   (B^T B) X + X (A A^T) = -(1/s^2) (B^T B)^-1 g_A A^T

Wang et al. 2024, the variant with Adam that the paper trains with. B (out, r), A (r, in). Every step: g~ with
X = 0; Adam's moments of g~, (out, in) each, give a direction D; s B^T D and s D A^T take the places of g_A
and g_B and the equations are solved again, with X; the factors move along (gA, gB), and decay as under AdamW.
The Sylvester equation is solved in the eigenbases of B^T B and A A^T. Thin matrices are computed in float64,
full ones in float32 or better. Learning rate, betas (0.9, 0.999), eps and decay are the optimizer's.

**Memory**: two matrices (out, in) in float32 for every adapted weight, as much as Adam on the weights
themselves (8 bytes a weight), and a third and a fourth of one weight while it is stepped. r matters little.

Start: as the structure's. While B = 0, B^T B has the pseudo-inverse zero: A stays and
gB = (1/s^2) g_B (A A^T)^-1, as in the paper. Gram matrices are damped by 1e-8 times their mean eigenvalue
(the official code adds 1e-8 whatever the size of B, which is far from relative right after the start).
`max_norm` clips the norm of g~ over all weights, which is the gradient that the method has; clipping the
factors' own before the step works too and measures something else.

Deviations: s is the structure's (the official code has 16/8 written in); bias correction starts at step 1
(there at 2). Dropout on the input of the change is refused, since it breaks the identity.

Use it where memory is no matter: the weight then follows its own gradient as closely as a low-rank change
can.
"""

from dataclasses import dataclass

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


@dynamics(
    "lora-pro",
    pairs="terms",
    noise=False,
    owns_step=True,
    gates=False,
    excludes=EXCLUDED,
    title="LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
    year=2024,
    arxiv="2407.18242",
    code="mrflogs/LoRA-Pro",
    formula="min over gA, gB of |s B gA + s gB A - G|_F, Adam on the product's gradient",
)
@dataclass(kw_only=True)
class LoraPro(Dynamics):
    """Adam on the equivalent gradient.

    Args:
        damping: added to both Gram matrices, relative to their mean eigenvalue, at least 0.
        max_norm: the most that the norm of all equivalent gradients may be, positive; None does not clip.
    """

    damping: float = 1e-8
    max_norm: float | None = None

    def __post_init__(self) -> None:
        check_numbers("lora-pro", self.max_norm, damping=self.damping)

    def suits(self, path: str, expression: Weight) -> None:
        """Refuse dropout."""
        refuse_dropout("lora-pro", path, expression)

    def check(self, run: Run) -> None:
        """Refuse what Adam's step of a product cannot follow."""
        check_run("lora-pro", run)

    def gradients_ready(self, run: Run) -> None:
        """Take the step of all factors, and leave the optimizer none."""
        found = [(pair, gradients_of(run, pair)) for pair in run.pairs]
        stepping = [(pair, *self.equivalent(g), g) for pair, g in found if g is not None]
        factor = clip((product_norm(left, right) for _, left, right, _ in stepping), self.max_norm)
        for pair, left, right, gradients in stepping:
            self.step(run, pair, factor * left, right, gradients)

    def equivalent(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Return g~ as a product of (out, 2 r) and (2 r, in)."""
        to_up, to_down = closest(gradients, self.damping, balance=False)
        left = torch.cat([gradients.up, to_up], 1)
        return gradients.scale * left, torch.cat([to_down, gradients.down])

    def step(self, run: Run, pair: TrainedPair, left: Tensor, right: Tensor, gradients: Gradients) -> None:
        """Move the factors of one product along the direction of `left @ right`."""
        direction = self.direction(run, pair, left, right)
        scale, (up, down) = gradients.scale, (gradients.up, gradients.down)
        to_up, to_down = (
            scale * (direction @ down.mT.to(direction)).to(down),
            scale * (up.mT.to(direction) @ direction).to(up),
        )
        steps = closest(Gradients(up, down, to_up, to_down, scale), self.damping)
        for factor, step in zip((pair.up, pair.down), steps, strict=True):
            numbers = options(run, factor)
            move(factor, step, numbers["lr"], numbers["weight_decay"])

    def direction(self, run: Run, pair: TrainedPair, left: Tensor, right: Tensor) -> Tensor:
        """Return Adam's normalised direction D (out, in) of the gradient `left @ right`."""
        memory, numbers, dtype = run.memory(pair.key), options(run, pair.up), wide(pair.up)
        gradient = left.to(dtype) @ right.to(dtype)
        beta, second_beta = numbers["betas"]
        for name in ("mean", "square"):
            kept = memory.get(name)
            memory[name] = torch.zeros_like(gradient) if kept is None else kept.to(gradient.device)
        memory["steps"] = memory.get("steps", 0) + 1
        mean = memory["mean"].lerp_(gradient, 1 - beta)
        square = memory["square"].mul_(second_beta).addcmul_(gradient, gradient, value=1 - second_beta)
        size = (square / (1 - second_beta ** memory["steps"])).sqrt_().add_(numbers["eps"])
        return torch.div(mean, size, out=gradient).div_(1 - beta ** memory["steps"])


def closest(gradients: Gradients, damping: float = 0.0, *, balance: bool = True) -> tuple[Tensor, Tensor]:
    """Return (gB, gA), the update of the factors that moves W closest to its gradient.

    Args:
        gradients: factors B (out, r) and A (r, in) with their gradients.
        damping: of the Gram matrices, relative to their mean eigenvalue.
        balance: choose X nearest to the plain gradients; otherwise X = 0.
    """
    up, down, scale = gradients.up, gradients.down, gradients.scale
    of_up, of_down = gram(up, damping), gram(down.mT, damping)
    to_down = of_up.inverse @ gradients.to_down / scale**2
    seen = up @ (of_up.inverse @ (up.mT @ gradients.to_up))
    to_up = (gradients.to_up - seen) @ of_down.inverse / scale**2
    if not balance:
        return to_up, to_down
    right = of_up.vectors.mT @ -(to_down @ down.mT) @ of_down.vectors
    sums = of_up.values[:, None] + of_down.values
    x = of_up.vectors @ torch.where(sums > 0, right / sums, 0) @ of_down.vectors.mT
    return to_up - up @ x, to_down + x @ down


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return `|left @ right|_F` without forming the product.

    Example:
        >>> product_norm(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(10.)
    """
    return ((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0).sqrt()
