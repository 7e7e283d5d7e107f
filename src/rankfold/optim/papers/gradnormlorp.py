"""GradNormLoRP: GaLore on the directions of weight-normalised rows, and Adam on their lengths.

    W = g V / |V|,   one g and one norm |V| for each row
    dg = <G, V / |V|>,   dV = (g / |V|) (G - dg V / |V|)
    V <- V - lr scale P adam(P^T dV),   g <- g - lr adam(dg)

Huang et al. 2024. V = W and g = |V| at the start, so that the model is what it was; row i of dV is at right
angles to row i of V. The state has g and |V|, two numbers a row, and Adam's moments of g beside GaLore's; V
is W |V| / g and not kept. Pretraining defaults, r = 128, T = 250, scale = 0.25 and lr = 0.01, are the
paper's (r = 4 to 8, T = 500, scale 2 to 4 and lr = 3e-5 for GLUE), eps = 1e-6 its code's. Weight decay acts
on V and on g, as there. Start: the weights as they are; nothing is added to the model.

Deviations: the official code leaves out dg V / |V| in dV, sets g to |V| again before every step, and keeps
V as a copy of W; here are the equations. A row of zeros, which has no direction, takes that of -G. Weights
in half precision, which rewriting would wear down, are steps on a float32 copy (`rounding="master"`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidOption
from ..inner import Adam
from ..matrices import Work, is_projected
from ..projected import ProjectedOptimizer
from ..recipes import groups, optimizer
from ..refusals import require_finite, require_fitting
from ..rounding import HALF

_OWN = "magnitude."  # before the names of the moments of g


class _Divided(NamedTuple):
    """A weight that is V for the time of a step."""

    work: Work
    weight: Tensor  # V; memory of the parameter or of its float32 copy
    slope: Tensor  # (out,), dg


class GradNormLoRP(ProjectedOptimizer):
    """GaLore on the directions of rows, Adam on their lengths; `gradnormlorp` makes it."""

    def _admit(self, index: int, group: dict[str, Any]) -> None:
        """Refuse a group whose weights in half precision have no float32 copy."""
        super()._admit(index, group)
        half = [p for p in group["params"] if p.dtype in HALF and is_projected(group, p)]
        if half and group["rounding"] != "master":
            raise InvalidOption(
                f"gradnormlorp rewrites a weight in every step, which {half[0].dtype} does not bear: "
                'use rounding="master"'
            )

    def _step(self, work: list[Work]) -> None:
        layouts = [self._layout(each) for each in work]
        for each, layout in zip(work, layouts, strict=True):
            require_fitting(each, self.inner, layout.low, self.state.get(each.parameter, {}))
        require_finite(work, [o.local(each.gradient) for each, o in zip(work, layouts, strict=True)])
        # One after another, so that a single dV is alive; a common clip needs them all.
        for part in [work] if self.clip is not None else [[each] for each in work]:
            rows = {
                each.name: self._divided(each) for each in part if is_projected(each.group, each.parameter)
            }
            super()._step([rows[each.name].work if each.name in rows else each for each in part])
            for divided in rows.values():
                self._joined(divided)

    def _divided(self, work: Work) -> _Divided:
        """Turn W into V where it stands, and the gradient into dV."""
        state = self._begun(work)
        weight = state.get("master", work.parameter)
        gradient = work.gradient.to(weight.dtype)
        norms = _norms(weight)
        if "magnitude" not in state:
            state["magnitude"], state["length"] = norms.clone(), _or_one(norms)
        magnitude, length = state["magnitude"], state["length"]
        sign = torch.where(magnitude < 0, -1.0, 1.0).to(norms)
        falling = gradient * _each_row(-1 / _or_one(_norms(gradient)), gradient)
        is_zero = _each_row(norms == 0, weight)
        unit = torch.where(is_zero, falling, weight * _each_row(sign / _or_one(norms), weight))
        slope = (gradient * unit).flatten(1).sum(1)
        inward = (gradient - _each_row(slope, unit) * unit) * _each_row(magnitude / length, unit)
        weight.copy_(unit * _each_row(length, unit))
        return _Divided(replace(work, gradient=inward), weight, slope)

    def _joined(self, divided: _Divided) -> None:
        """Move g, and turn V into W."""
        work, weight, slope = divided
        group, state = work.group, self.state[work.parameter]
        moments = {key.removeprefix(_OWN): state[key] for key in state if key.startswith(_OWN)}
        direction, factor = self.inner.direction(slope, moments, int(state["step"]))
        state.update({_OWN + key: value for key, value in moments.items()})
        kept = 1 - group["lr"] * group["weight_decay"]
        state["magnitude"].mul_(kept).sub_(group["lr"] * factor * direction)
        state["length"] = _or_one(_norms(weight))
        weight.mul_(_each_row(state["magnitude"] / state["length"], weight))
        if "master" in state:
            work.parameter.copy_(state["master"])


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = weight.flatten(1).norm(dim=1)
    return norms


def _or_one(norms: Tensor) -> Tensor:
    """Return norms to divide by."""
    return torch.where(norms > 0, norms, 1.0)


def _each_row(values: Tensor, like: Tensor) -> Tensor:
    """Return a number for each row, shaped so that it meets all of the row."""
    return values.view(-1, *([1] * (like.dim() - 1)))


@optimizer(
    "gradnormlorp",
    title="Gradient Weight-Normalized Low-Rank Projection for Efficient LLM Training",
    year=2024,
    arxiv="2412.19616",
    code="Jhhuangkay/Gradient-Weight-normalized-Low-rank-Projection-for-Efficient-LLM-Training",
    formula="W = g V / |V|, V <- V - lr scale P adam(P^T dV), g <- g - lr adam(dg)",
)
def gradnormlorp(
    params: Any,
    lr: float = 0.01,
    *,
    rank: int = 128,
    refresh: int = 250,
    scale: float = 0.25,
    plain: tuple[str, ...] | None = None,
    **options: Any,
) -> GradNormLoRP:
    """Return the optimizer.

    Args:
        params: a model, (name, parameter) pairs, parameters or groups.
        lr: learning rate, of directions and lengths.
        rank: r, of the projected gradients of V, which moments are kept for.
        refresh: T, steps between two bases.
        scale: of what comes back from the low rank.
        plain: words in the names of weights that are not projected; None means the tables of a
            model's embeddings and heads, and names with "embed" or "lm_head" where no model is given.
        options: further ones of `ProjectedOptimizer`.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.gradnormlorp(layer, rank=4)
        >>> [group["rank"] for group in optimizer.param_groups]
        [4, None]
    """
    given: dict[str, Any] = {"inner": Adam(eps=1e-6), "rounding": "master", **options}
    return GradNormLoRP(groups(params, rank, plain), lr, rank=rank, refresh=refresh, scale=scale, **given)
