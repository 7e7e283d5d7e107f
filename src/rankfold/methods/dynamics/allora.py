"""ALLoRA: rows of the change that are still small learn faster, and neither dropout nor alpha is needed.

    W = W0 + B A,   d_i = |row i of B A|,   c_i = 1 / sqrt(d_i + 1/eta^2),   row i of B: learning rate c_i lr

Huang and Balestriero 2024. B (out, r), A (r, in). At B = 0 the multiplier is eta; it falls like d_i^(-1/2) as
a row grows. d_i^2 = b_i (A A^T) b_i^T, so that B A is never formed. Under a rank rule d_i is that of
B diag(gate) A. The forward pass and the gradient of the input are those of LoRA. eta = 3 lies in the middle
of the range of 1 to 10 in which it should be searched; no default is confirmed. Start: as the structure's.

The paper scales the gradient that enters the change. Under Adam a constant factor of a gradient cancels, so
that it is the optimizer's step of B, weight decay included, that is scaled here: with SGD that is the paper's
rule for B exactly, and with any other optimizer its meaning. A mixes all rows and keeps the base rate.

Experimental: whether d_i or its square stands under the root could not be confirmed. The structure's alpha
and dropout must be left at their defaults (s = 1, none), because the method replaces both.
"""

from dataclasses import dataclass

from torch import Tensor

from ...errors import Incompatible
from ...weights import Weight
from ..limits import in_range
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run, TrainedPair
from .owned import precise, refuse_dropout


@dynamics(
    "allora",
    pairs="terms",
    noise=False,
    excludes=(
        "relora", "periodic-lora", "switchlora", "refactorisation", "shrink-perturb", "shrink-perturb-all",
        "hd-pissa",
    ),
    status="experimental",
    title="ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    year=2024,
    arxiv="2410.09692",
    formula="lr of row i of B: lr / sqrt(|(B A)_i| + 1/eta^2)",
)  # fmt: skip
@dataclass(kw_only=True)
class Allora(Dynamics):
    """Learning rates of the rows of B.

    Args:
        eta: the multiplier of a row of zeros, positive.
    """

    eta: float = 3.0

    def __post_init__(self) -> None:
        in_range("allora", "(0, inf)", eta=self.eta)

    def suits(self, path: str, expression: Weight) -> None:
        """Refuse dropout, and a scaling other than 1."""
        refuse_dropout("allora", path, expression, "its learning rates take the place of it")
        for pair in expression.pairs():
            if abs(pair.scale - 1) > 1e-9:
                raise Incompatible(
                    f"{path}: allora works without alpha, and the change is scaled by {pair.scale:g}; "
                    "leave alpha out, so that the scaling is 1"
                )

    def gradients_ready(self, run: Run) -> None:
        """Remember B and its multipliers during the step."""
        for pair in run.pairs:
            if pair.up.grad is not None:
                held = {"before": pair.up.detach().clone(), "factors": self.multipliers(pair)}
                run.memory(pair.key).update(held)

    def stepped(self, run: Run) -> None:
        """Scale the step that the optimizer took with every row of B."""
        for pair in run.pairs:
            memory = run.memory(pair.key)
            if "before" in memory:
                before, factors = memory.pop("before"), memory.pop("factors")
                pair.up.copy_(before + factors[:, None] * (pair.up - before))

    def multipliers(self, pair: TrainedPair) -> Tensor:
        """Return c_i of every row, (out,)."""
        up, down = precise(pair.up), precise(pair.down)
        rows = up if pair.gate is None else up * precise(pair.gate)
        norms = ((rows @ (down @ down.mT)) * rows).sum(1).clamp_min(0).sqrt()
        return (norms + self.eta**-2).rsqrt().to(pair.up)
