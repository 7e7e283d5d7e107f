"""Shrink and perturb: before training on new data, weights are scaled towards zero and noise is added.

    theta <- lambda theta + p,   p ~ N(0, sigma^2)

Ash and Adams 2019. For an adapter theta is the product s B A, B (out, r), A (r, in): B <- lambda B + p_B and
A <- A + p_A, so that without noise the product is multiplied by lambda, where both factors scaled would give
lambda^2. A keeps its size, so that the gradients of B, s G A^T, stay what they are. With the dynamics
`shrink-perturb-all` theta is the whole weight, W0 + s B A, and the noise also goes into it; it moves a copy
in float32 or better. Everything else that is trained, such as gates, is left alone; where the rows of a
weight are normalised, their trained lengths shrink instead of it. The optimizer's state of the factors starts
again. lambda = 0.5 is the middle of the useful range, 0.3 to 0.6, and sigma = 0.01 the paper's; noise of a
fixed sigma knows nothing of a layer's width. Start: as the structure's.

`shrink_and_perturb` does it once, at a moment of the caller's choice; the dynamics do it every `interval`
steps and after the steps listed in `at`. It changes the model's function: that is its purpose.

Use it before or while training goes on with new data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import Incompatible, InvalidOption
from ...layers import require
from ...optim import reset, unwrapped
from ...weights import Moved, Normalized, Weight
from ..limits import in_range
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run, TrainedPair
from ..site import derived_seed

_ABOUT: dict[str, Any] = {
    "pairs": "terms",
    "example": {"interval": 5, "shrink": 0.95},
    "excludes": ("shrink-perturb", "shrink-perturb-all"),
    "title": "On Warm-Starting Neural Network Training",
    "year": 2019,
    "arxiv": "1910.08475",
}


@dynamics("shrink-perturb", formula="s B A <- lambda s B A + noise, at given steps", **_ABOUT)
@dataclass(kw_only=True)
class ShrinkPerturb(Dynamics):
    """Shrinking the change.

    Args:
        interval: optimizer steps from one time to the next, at least 1; None leaves it to `at`.
        at: steps after which it is done too, each at least 1.
        shrink: lambda, in [0, 1].
        noise: sigma, at least 0.
    """

    interval: int | None = None
    at: Sequence[int] = ()
    shrink: float = 0.5
    noise: float = 0.01

    whole: ClassVar[bool] = False  # the weight, and not only its change

    def __post_init__(self) -> None:
        _check(self.shrink, self.noise)
        in_range("shrink-perturb", "[1, inf)", interval=self.interval)
        for step in self.at:
            in_range("shrink-perturb", "[1, inf)", at=step)
        if self.interval is None and not self.at:
            raise InvalidOption(
                "shrink-perturb has no moment to act: give interval or at, or call "
                "rankfold.methods.dynamics.shrink_perturb.shrink_and_perturb"
            )

    def stepped(self, run: Run) -> None:
        """Shrink and perturb where it is time."""
        if run.step in self.at or (self.interval is not None and run.step % self.interval == 0):
            for path, expression in run.expressions.items():
                pairs = [pair for pair in run.pairs if pair.path == path]
                apply(
                    expression, pairs, self.shrink, self.noise, run.generator(path), run.optimizer, self.whole
                )


@dynamics(
    "shrink-perturb-all",
    moves_base=True,
    formula="W0 + s B A <- lambda (W0 + s B A) + noise, at given steps",
    **_ABOUT,
)
@dataclass(kw_only=True)
class ShrinkPerturbAll(ShrinkPerturb):
    """Shrinking the whole weight; the options are those of `ShrinkPerturb`."""

    whole: ClassVar[bool] = True


def shrink_and_perturb(
    model: nn.Module,
    shrink: float = 0.5,
    noise: float = 0.01,
    *,
    optimizer: Any = None,
    whole: bool = False,
    seed: int = 0,
) -> None:
    """Scale what the active adapters have learned towards zero and add noise, once, in place.

        s B A <- lambda s B A + noise

    Args:
        model: an adapted model.
        shrink: lambda, in [0, 1]; 1 leaves the change as it is.
        noise: sigma, standard deviation of what is added to every number of the factors, at least 0.
        optimizer: whose state of the factors starts again; None where a new one will be made.
        whole: shrink W0 + s B A and not only s B A; the adapter must hold a copy of the weight.
        seed: of the noise.

    Raises:
        NotAdapted: the model holds no adapter.
        InvalidOption: a number is out of range.
        Incompatible: a weight has no trained product of two factors, or is a product of several, or there is
            no copy of the weight to shrink.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), "lora", rank=1, targets="0")
        >>> _ = torch.nn.init.ones_(model[0].expression.leaf("up").value)
        >>> shrink_and_perturb(model, 0.5, noise=0.0)
        >>> model[0].expression.leaf("up").value.flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    _check(shrink, noise)
    adaptation = require(model)
    found = [
        (path, expression, list(_pairs(path, expression)))
        for name in adaptation.active
        for path, expression in adaptation.expressions(name).items()
    ]
    _check_products(found, whole)
    inner = None if optimizer is None else unwrapped(optimizer)
    for path, expression, pairs in found:
        generator = torch.Generator().manual_seed(derived_seed(seed, "shrink-perturb", path))
        apply(expression, pairs, shrink, noise, generator, inner, whole)


def _pairs(path: str, expression: Weight) -> list[TrainedPair]:
    base = next((leaf for leaf in expression.leaves() if isinstance(leaf, Moved)), None)
    return [TrainedPair(path, pair, expression, base) for pair in expression.pairs()]


def _check_products(found: Sequence[tuple[str, Weight, list[TrainedPair]]], whole: bool) -> None:
    for path, expression, pairs in found:
        if len(pairs) != 1 and not (pairs and all(pair.pair.additive for pair in pairs)):
            raise Incompatible(f"{path} has no one trained product of two factors: {expression.formula()}")
        if whole and not all(pair.base is not None and pair.pair.additive for pair in pairs):
            raise Incompatible(
                f"{path} holds no copy of its weight that could shrink; adapt with the dynamics "
                "shrink-perturb-all or another that moves changes into the weight"
            )
    if not found:
        raise Incompatible("no active adapter changes a weight, so there is nothing to shrink")


@torch.no_grad()
def apply(
    expression: Weight,
    pairs: Sequence[TrainedPair],
    shrink: float,
    noise: float,
    generator: torch.Generator,
    optimizer: Optimizer | None,
    whole: bool = False,
) -> None:
    """Shrink and perturb the products of one weight.

    Args:
        expression: of the weight.
        pairs: its products.
        shrink: lambda.
        noise: sigma.
        generator: of the noise, on the CPU.
        optimizer: whose state of the factors starts again, or None.
        whole: shrink the weight itself too.
    """
    if whole and isinstance(expression, Normalized):
        expression.magnitude.tensor().mul_(shrink)  # a normalised direction has no length of its own
    else:
        rest = expression.dense() - sum(pair.change() for pair in pairs) if whole else None
        for pair in pairs:
            pair.up.mul_(shrink)
        if rest is not None:
            pairs[0].move_into_base((shrink - 1) * rest)
    for pair in pairs:
        for factor in (pair.up, pair.down):
            factor.add_(_noise(factor, noise, generator))
            if optimizer is not None:
                reset(optimizer, factor)
    if whole and pairs[0].base is not None:
        pairs[0].move_into_base(_noise(pairs[0].base.tensor(), noise, generator))


def _noise(like: Tensor, size: float, generator: torch.Generator) -> Tensor:
    return size * torch.randn(like.shape, generator=generator).to(like)


def _check(shrink: float, noise: float) -> None:
    in_range("shrink-perturb", "[0, 1]", shrink=shrink)
    in_range("shrink-perturb", "[0, inf)", noise=noise)
