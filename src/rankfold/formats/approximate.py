"""The pair that is written for a weight's change: exact, or the best within a rank or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import Incompatible, InvalidOption
from ..layers import StructuredLayer
from ..linalg import Gram, Metric, psd_root, weighted_low_rank
from ..weights import Weight
from .change import Pair, approximated, dense_change, exact_change, smallest_rank, tail_error, truncated

ROUNDING = 1e-6  # relative error of a change up to which it counts as written exactly
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Goal:
    """How near to a change its pair has to be, and in which metric.

    Attributes:
        rank: of the pair; None lets the error choose.
        max_error: largest relative error, in the metric of the weight; None writes exact changes only, unless
            `rank` is given.
        grams: Gram matrices C (in, in) of inputs by path. A weight that has one is approximated in the
            metric `||(T - X) C^(1/2)||_F`, the error of its outputs; any other in the Frobenius norm.
    """

    rank: int | None = None
    max_error: float | None = None
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    _latest: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)

    @property
    def exact(self) -> bool:
        """Whether only exact changes may be written."""
        return self.rank is None and self.max_error is None

    def metric(self, path: str) -> Metric | None:
        """Return the metric of a weight's columns; neighbours that share their Gram matrix share its root."""
        gram = self.grams.get(path)
        if gram is None:
            return None
        if not self._latest or self._latest[0][0] is not gram:
            self._latest[:] = [(gram, psd_root(gram))]
        return Gram(self._latest[0][1])


def row_of(
    path: str,
    rank: int | None,
    error: float = 0.0,
    exact: bool = True,
    further: Mapping[str, float | None] | None = None,
) -> Row:
    """Return a row of the report."""
    return {"weight": path, "rank": rank, "exact": exact, "error": error, **(further or {})}


@torch.no_grad()
def change_of(path: str, expression: Weight, layer: StructuredLayer, goal: Goal) -> tuple[Pair, Row]:
    """Return up and down of a weight's change, scale folded in, and the report's row.

    Raises:
        InvalidOption: the change is not of low rank and the goal allows exact changes only.
        Incompatible: it holds NaN or infinite entries.
    """
    factors = exact_change(expression)
    if factors is not None:
        _check_finite(path, *factors)
    if factors is not None and _keeps(factors, goal):
        return factors, row_of(path, factors[0].shape[1], further=_no_output_error(goal, path))
    target = factors if factors is not None else dense_change(expression, layer.matrix())
    if isinstance(target, Tensor):
        _check_finite(path, target)
        if goal.exact:
            return _of_low_rank(path, target)
    pair, errors = fitted(target, goal, goal.metric(path))
    error = errors.pop("error")
    further = {"output_error": errors.get("output_error")} if goal.grams else {}
    return pair, row_of(path, pair[0].shape[1], error, exact=error == 0, further=further)


def _check_finite(path: str, *parts: Tensor) -> None:
    if not all(bool(part.isfinite().all()) for part in parts):
        raise Incompatible(f"{path}: its change holds NaN or infinite entries, as its weight may")


def _keeps(factors: Pair, goal: Goal) -> bool:
    return goal.exact or (goal.rank is not None and goal.rank >= factors[0].shape[1])


def _no_output_error(goal: Goal, path: str) -> dict[str, float | None]:
    return {"output_error": 0.0 if path in goal.grams else None} if goal.grams else {}


def _of_low_rank(path: str, change: Tensor) -> tuple[Pair, Row]:
    """Return the pair of a change that is of low rank up to rounding, whatever algebra it comes from."""
    pair, error = approximated(change, None, ROUNDING)
    rank = pair[0].shape[1]
    if rank * sum(change.shape) >= change.numel():
        raise InvalidOption(
            f"{path}: this change is not of low rank; pass rank= or max_error= for its best approximation"
        )
    return pair, row_of(path, rank, error)


@torch.no_grad()
def fitted(target: Tensor | Pair, goal: Goal, metric: Metric | None) -> tuple[Pair, dict[str, float]]:
    """Return the best pair for a change, and its relative errors.

        X = argmin over rank r of ||(T - X) M||_F,   output_error = ||(T - X) M||_F / ||T M||_F

    Args:
        target: T (out, in), or up (out, k) and down (k, in), whose product is never formed.
        goal: the rank or the largest error; of its Gram matrices nothing is read.
        metric: M of the columns; None is the identity.

    Returns:
        up (out, r) and down (r, in), and `error`, relative in the Frobenius norm, with a metric also
        `output_error`, relative in the metric.

    Example:
        >>> import torch
        >>> change, seen = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([0.01, 1.0]))
        >>> pair, errors = fitted(change, Goal(rank=1), Gram(seen))
        >>> (pair[0] @ pair[1]).abs().round(decimals=3)
        tensor([[0., 0.],
                [0., 1.]])
        >>> {name: round(value, 3) for name, value in errors.items()}
        {'error': 0.949, 'output_error': 0.03}
    """
    if metric is None:
        if isinstance(target, tuple):
            pair, error = truncated(target, goal.rank, goal.max_error)
        else:
            pair, error = approximated(target, goal.rank, goal.max_error)
        return pair, {"error": error}
    most = min(size for part in _parts(target) for size in part.shape)
    near = weighted_low_rank(target, most if goal.rank is None else min(goal.rank, most), right=metric)
    rank = near.rank if goal.rank is not None else smallest_rank(near.spectrum, goal.max_error)
    pair = _balanced(near.up[:, :rank], near.down[:rank])
    return pair, {"error": _relative(target, pair), "output_error": tail_error(near.spectrum, rank)}


def _parts(target: Tensor | Pair) -> tuple[Tensor, ...]:
    return target if isinstance(target, tuple) else (target,)


def _balanced(up: Tensor, down: Tensor) -> Pair:
    """Give both sides of every term one norm, as files in half precision need it."""
    tall, wide = up.norm(dim=0), down.norm(dim=1)
    even = torch.where((tall > 0) & (wide > 0), wide / tall, 1).sqrt()
    return up * even, down / even[:, None]


def _relative(target: Tensor | Pair, pair: Pair) -> float:
    """Return `||T - X||_F / ||T||_F`, of factors without forming their product."""
    if isinstance(target, tuple):
        rest = torch.cat([target[0], -pair[0]], 1), torch.cat([target[1], pair[1]], 0)
        size, distance = _norm(*target), _norm(*rest)
    else:
        size, distance = float(target.norm()), float((target - pair[0] @ pair[1]).norm())
    return distance / size if size else 0.0


def _norm(up: Tensor, down: Tensor) -> float:
    tall = torch.linalg.qr(up.double(), mode="r").R
    wide = torch.linalg.qr(down.T.double(), mode="r").R
    return float((tall @ wide.T).norm())
