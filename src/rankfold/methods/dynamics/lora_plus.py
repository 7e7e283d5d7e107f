"""LoRA+: the output side of an adapter learns faster than its input side.

    lr_B = ratio * lr,   lr_A = lr

Hayou et al. 2024. For width n and Adam, efficient feature learning needs lr_A = O(1/n) and lr_B = O(1); the
paper recommends a ratio of 2^4, the default, with a base rate about half of LoRA's. Everything that is on
neither side keeps the base rate. Start: unchanged.

Deviations: the adapter of an embedding is no exception (in the authors' code it has a rate of its own); in
structures without factors B and A, the side is that of the trained leaf (vera: b is output, d is input).

Use it with every structure that has an output side and an input side; it costs no memory and no time.
"""

from dataclasses import dataclass

from torch import nn

from ...errors import Incompatible
from ...weights import Leaf, Weight
from ..limits import in_range
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run


@dynamics(
    "lora+",
    sides=True,
    title="LoRA+: Efficient Low Rank Adaptation of Large Models",
    year=2024,
    arxiv="2402.12354",
    code="nikhil-ghosh-berkeley/loraplus",
    formula="lr_B = ratio * lr_A",
)
@dataclass(kw_only=True)
class LoraPlus(Dynamics):
    """Learning rates by side.

    Args:
        ratio: of the output side's learning rate to the input side's, positive; 1 is plain training.
    """

    ratio: float = 16.0

    def __post_init__(self) -> None:
        in_range("lora+", "(0, inf)", ratio=self.ratio)

    def rate(self, side: str, leaf: Leaf, expression: Weight) -> float:
        """Return the ratio on the output side."""
        return self.ratio if side == "output" else 1.0

    def check(self, run: Run) -> None:
        """Refuse an optimizer whose groups do not have the ratio."""
        for expression in run.expressions.values():
            rates: dict[str, list[float]] = {"input": [], "output": []}
            for leaf, side in expression.sides():
                value = leaf.tensor()
                if side in rates and isinstance(value, nn.Parameter):  # what is derived from one has no rate
                    rates[side].append(float(run.group(value)["lr"]))
            slow = [self.ratio * rate for rate in rates["input"]]
            if any(abs(fast - rate) > 1e-6 * abs(fast) for fast in rates["output"] for rate in slow):
                raise Incompatible(
                    f"lora+ wants a learning rate {self.ratio:g} times as high on the output side; create "
                    "the optimizer from rankfold.param_groups(model, lr=...)"
                )
