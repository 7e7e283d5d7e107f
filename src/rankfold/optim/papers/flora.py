"""Flora: Adafactor whose momentum, or whose accumulated gradients, are kept as a random projection.

    U = G / sqrt(p q^T / mean(p)),   p, q running means of rows and of columns of G^2, decay 1 - t^-0.8
    D = (1 - b) U + b A^T C,   C <- A' A^T C every kappa steps,   C <- b C + (1 - b) A U
    W <- W - lr max(1e-3, rms(W)) D / max(1, rms(D))

Hao, Cao and Mou 2024. A (r, d) has entries of variance 1 / r, so that A^T A is the identity in the mean; d
is the shorter side. A is drawn, on the CPU, whenever it is met, from the optimizer's seed, the weight's name
and the number of the interval: neither it nor a seed of its own is stored. Weights that hold the rank, with
sides at most 4 times apart, have a compressed momentum, others a full one. kappa = 1000, r = 256, b = 0.9,
the decay, eps and clip are the paper's, lr = 1e-3 its for T5-small from scratch. Each transport makes the
momentum's squared norm 1 + (d + 1) / r times as large: kappa below 100 is too small. Start: the weights as
they are; nothing is added to the model. `CompressedAccumulation` compresses sums of gradients.

Deviations: seeds come from names, the official code's from places in the list of parameters; kernels of
convolutions are matrices; embeddings and the head have full momenta; weight decay is lr wd, without rms(W).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidOption
from ..accumulation import gaussian
from ..inner import Adafactor
from ..matrices import Layout, State, Work, floating, layout_of, matrix_shape
from ..projected import ProjectedOptimizer
from ..recipes import groups, optimizer
from ..refusals import require_finite, require_fitting, spelled


class Flora(ProjectedOptimizer):
    """Adafactor with a compressed momentum; `flora` makes it and says what its options are."""

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        rank: int | None,
        kappa: int,
        momentum: float,
        normalise: Adafactor,
        clip: float,
        least: float | None,
        weight_decay: float = 0.0,
        side: str = "auto",
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise InvalidOption(f"flora: momentum must be in [0, 1), not {momentum}")
        self.momentum, self.normalise, self.largest, self.least = momentum, normalise, clip, least
        common: dict[str, Any] = {"weight_decay": weight_decay, "rounding": rounding, "seed": seed}
        super().__init__(params, lr, rank=rank, refresh=kappa, projector="gaussian", side=side, **common)

    def _parts(self) -> str:
        own = {name: getattr(self, name) for name in ("momentum", "normalise", "largest", "least")}
        return ", ".join([super()._parts(), *(f"{name}={spelled(value)}" for name, value in own.items())])

    def _step(self, work: list[Work]) -> None:
        both = [(each, layout_of(each.group, each.parameter, columnwise=False)) for each in work]
        for each, layout in both:
            require_fitting(each, self.inner, layout.low, self.state.get(each.parameter, {}))
        require_finite(work, [layout.local(each.gradient) for each, layout in both])
        for each, layout in both:
            self._take(each, layout)

    def _take(self, work: Work, layout: Layout) -> None:
        """Move one parameter."""
        kept = self._begun(work)
        state = layout.opened(kept)
        state["step"] += 1
        update, _ = self.normalise.direction(layout.gradient(work.gradient), state, int(state["step"]))
        update = self._with_momentum(work, layout, update, state)
        size = 1 / (_rms(update) / self.largest).clamp_min(1.0)
        if self.least is not None:
            size *= _rms(kept.get("master", work.parameter)).clamp_min(self.least)
        base, target = layout.begin(work.group, state)
        target.sub_(size * update, alpha=work.group["lr"])
        layout.end(work, state, base, target)
        layout.close(kept, state)

    def _with_momentum(self, work: Work, layout: Layout, update: Tensor, state: State) -> Tensor:
        """Return D, from U (d, n) and the momentum as it was, and let the momentum follow."""
        if not self.momentum:
            return update
        kept: Tensor = state.setdefault("exp_avg", update.new_zeros(layout.low))
        if not layout.projected:
            return kept.lerp_(update, 1 - self.momentum)
        last, now = ((int(state["step"]) - back) // work.group["refresh"] for back in (1, 0))
        basis = gaussian(update, len(kept), self.seed, work.name, last)
        mixed = torch.addmm(update, basis.T, kept, beta=1 - self.momentum, alpha=self.momentum)
        if now != last:
            basis, old = gaussian(update, len(kept), self.seed, work.name, now), basis
            kept.copy_((basis @ old.T) @ kept)
        kept.mul_(self.momentum).addmm_(basis, update, alpha=1 - self.momentum)
        return mixed


def _rms(value: Tensor) -> Tensor:
    size: Tensor = floating(value).norm() / value.numel() ** 0.5
    return size.full_tensor() if hasattr(size, "full_tensor") else size


@optimizer(
    "flora",
    title="Flora: Low-Rank Adapters Are Secretly Gradient Compressors",
    year=2024,
    arxiv="2402.03293",
    code="BorealisAI/flora-opt",
    formula="D = (1 - b) U + b A^T C, C <- b C + (1 - b) A U, A random, U = adafactor(G)",
)
def flora(
    params: Any,
    lr: float = 1e-3,
    *,
    rank: int = 256,
    kappa: int = 1000,
    momentum: float = 0.9,
    decay: float = -0.8,
    eps: float = 1e-30,
    clip: float = 1.0,
    least: float | None = 1e-3,
    aspect: float = 4.0,
    plain: tuple[str, ...] | None = None,
    **options: Any,
) -> Flora:
    """Return the optimizer.

    Args:
        params: a model, (name, parameter) pairs, parameters or groups.
        lr: learning rate, in units of each weight's root mean square.
        rank: r, of the compressed momentum.
        kappa: steps between two random projections.
        momentum: b, in [0, 1); 0 keeps none.
        decay: the second moment's decay in step t is 1 - t^decay.
        eps: added to squares.
        clip: largest root mean square of D.
        least: smallest root mean square of a weight that lr is in units of; None takes lr as it is.
        aspect: most that the longer side may be of the shorter one, for a compressed momentum.
        plain: words in the names of weights whose momentum is not compressed; None means the tables of a
            model's embeddings and heads, and names with "embed" or "lm_head" where no model is given.
        options: weight_decay, side, rounding and seed of `ProjectedOptimizer`.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.flora(layer, rank=4)
        >>> [group["rank"] for group in optimizer.param_groups]
        [4, None]
    """
    normalise = Adafactor(decay, eps, math.inf)
    own: dict[str, Any] = {"momentum": momentum, "normalise": normalise, "clip": clip, "least": least}
    made = _near_square(groups(params, rank, plain), aspect)
    return Flora(made, lr, rank=rank, kappa=kappa, **own, **options)


def _near_square(made: list[dict[str, Any]], aspect: float) -> list[dict[str, Any]]:
    """Take weights with sides too far apart out of the groups that were made by name and rank."""
    if not all(isinstance(pair, tuple) for group in made for pair in group["params"]):
        return made
    low: list[Any] = []
    rest: list[Any] = []
    for group in made:
        for name, parameter in group["params"]:
            rows, columns = matrix_shape(parameter) if parameter.dim() > 1 else (1, 1)
            fits = group["rank"] is not None and max(rows, columns) <= aspect * min(rows, columns)
            (low if fits else rest).append((name, parameter))
    rank = next((group["rank"] for group in made if group["rank"] is not None), None)
    return [{"params": part, "rank": r} for part, r in ((low, rank), (rest, None)) if part]
