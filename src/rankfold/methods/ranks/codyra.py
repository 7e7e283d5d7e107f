"""CoDyRA: gates of one task after the other, sparse before each is merged into the weight.

    W_t = W_{t-1} + s B diag(g) A,   after every step past the dense share:  g <- sign(g) max(|g| - kappa, 0)

Lu et al. 2024. A task trains densely for half of its steps; then kappa climbs from 0 to `threshold` over 50
levels. Shrinking adds up: 0.005 over 250 steps takes up to 0.6 from a gate. Terms whose gate is zero
are taken away when a task's training is over, and `next_task` merges what is left and begins the next task
with fresh factors: nothing is left at inference, and the function at a task's start is that of the last one's
end. The defaults are the authors' (rank 16, s = 1, learning rate 5e-4, betas 0.9 and 0.9999 there). In half
precision merged weights are rounded at every task.

Start: with a zero product g ~ N(0, 1), else g = 1, as for SoRA.

Deviation: the proximal step itself; the authors' code also zeroes what it leaves within kappa of zero
(`dead_zone`).
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...layers import fold, require
from ...weights import Leaf
from ..events import drop_closed, over
from ..limits import in_range
from ..recipe import Recipe
from ..registry import ranks
from ..rules import DynamicRanks
from ..run import Run
from ..site import Place
from .sora import drawn_gate, shrink


@ranks(
    "codyra",
    title="Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language "
    "Models with Dynamic Rank-Selective LoRA",
    year=2024,
    arxiv="2412.01004",
    code="Artificer-AI-Lab/CoDyRA",
    formula="g <- sign(g) max(|g| - kappa(t), 0), kappa climbing after a dense phase; merged after each task",
)
@dataclass(kw_only=True)
class CoDyRA(DynamicRanks):
    """Gates under proximal steps that grow.

    Args:
        threshold: the largest kappa, at least 0.
        dense: share of the training without shrinking, in [0, 1).
        levels: values that kappa takes, 0 and the largest among them, at least 2.
        dead_zone: also zero what is left within kappa of zero, as the authors' code does.
    """

    threshold: float = 0.005
    dense: float = 0.5
    levels: int = 50
    dead_zone: bool = False
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)
    opens: ClassVar[bool] = False  # the sparse steps would put gates that start at zero back there

    def __post_init__(self) -> None:
        in_range("codyra", "[0, inf)", threshold=self.threshold)
        in_range("codyra", "[0, 1)", dense=self.dense)
        in_range("codyra", "[2, inf)", levels=self.levels)

    def gate(self, site: Place, name: str, rank: int, start: str) -> Leaf:
        """Return the gate of a product."""
        return drawn_gate(site, name, rank, start)

    def stepped(self, run: Run) -> None:
        """Take the proximal step, after the dense share."""
        kappa = self.kappa(run)
        if kappa:
            shrink(run.pairs, kappa, dead_zone=self.dead_zone)

    def finish(self, run: Run) -> None:
        """Take the closed terms away, if training is over."""
        if over(run):
            drop_closed(run)

    def kappa(self, run: Run) -> float:
        """Return the threshold of a step."""
        assert run.total_steps is not None
        first = int(self.dense * run.total_steps)
        done = (run.step - first - 1) / max(1, run.total_steps - first - 1)  # 0 at the first sparse step
        level = int(min(max(done, 0.0), 1.0) * (self.levels - 1))
        return self.threshold * level / (self.levels - 1)


def next_task(model: nn.Module, *, seed: int | None = None, **arguments: Any) -> nn.Module:
    """Merge the active adapter into the weights and adapt the same weights again, for the next task.

    The function stays what it is, up to the rounding of the merged weights, where the recipe's start keeps
    the base's. Remove the handle of the last task first, and create the next optimizer afterwards.

    Args:
        model: an adapted model; changed in place and returned.
        seed: of the new factors; None takes the one after the last task's.
        arguments: further ones of `adapt`, such as `data` where the initialiser reads any.

    Raises:
        NotAdapted: the model holds no adapter.
        NotDense, UnsupportedLayer: the change cannot be merged.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), "lora/codyra", rank=4, targets="0")
        >>> next_task(model)[0].expression
        W0[8x8] + (up*[8x4] @ diag(gate*[4]) @ down*[4x8])
    """
    from ..adapt import adapt

    adapter = require(model).adapter()
    record = adapter.record
    again: dict[str, Any] = {
        "rank": record["rank"],
        "targets": re.compile("|".join(re.escape(path) for path in record["targets"])),
        "train": [f"re:{re.escape(path)}" for path in record["train"]],
        "name": adapter.name,
        "seed": record["seed"] + 1 if seed is None else seed,
    }
    fold(model)
    return adapt(model, Recipe.from_dict(record["recipe"]), **{**again, **arguments})
