"""AutoLoRA: meta-learned selection weights of the rank-1 terms, cut at 1/r, give every weight its rank.

    dW_l = s B diag(a_l) A,   a_l = softmax(theta_l),   r_l = #{i : a_li >= 1/r}
    min over theta of L_validation(B*(theta), A*(theta), theta),   B*, A* = argmin of L_train(., theta)

Zhang et al. 2024. `search` runs the bilevel search on an adapted model and returns the ranks; the factors
and theta of the search are lost on purpose, and an adapter is trained anew with the ranks found:

    found = search(model, training, validation, steps=..., loss=...)
    rf.remove(model)
    rf.adapt(model, Recipe("lora", ranks=("autolora", {"ranks": found})), rank=8)

The lower level takes one step of rate eta ahead (Liu et al. 2019, DARTS), w' = w - eta dL_train/dw, so that

    hypergradient = dL_val(w')/dtheta - eta (dL_train(w+)/dtheta - dL_train(w-)/dtheta) / (2 eps),
    w+- = w +- eps v,   v = dL_val(w')/dw',   eps = 0.01 / ||v||

theta starts at 1, both levels take Adam at 3e-4, the upper one with betas (0.5, 0.999): the official
code's. As there, alpha is divided by a weight's own rank. Start: the structure's and the initialiser's.

Deviation: the official code compares theta / sum(theta) with 1/r; here it is the softmax, so that 1 <= r_l
<= r whatever the signs of theta.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import Incompatible, InvalidOption
from ...layers import require
from ...statistics.batches import Batch, check_batches, loss_of
from ...weights import Dense, Leaf, Pair
from ..limits import in_range
from ..registry import ranks
from ..rules import Unit
from ..tables import tabled

_PROBE = 0.01  # length of the step of the central differences


@ranks(
    "autolora",
    scales="own",
    example={"ranks": {"*": 2}},
    title="AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta Learning",
    year=2024,
    arxiv="2403.09113",
    code="ruz048/AutoLoRA",
    formula="r_l = #{i : softmax(theta_l)_i >= 1/r}, theta by bilevel search",
)
def autolora(units: Sequence[Unit], rank: int, *, ranks: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the ranks that a search has found.

    Args:
        units: the weights.
        rank: not used.
        ranks: by path, as `rankfold.methods.ranks.autolora.search` returns them.
    """
    return tabled("autolora", units, ranks, "autolora.search(model, training, validation, ...)")


class Softmax(Leaf):
    """Selection weights `softmax(theta)` of the terms of a product, theta trained.

    Args:
        theta: leaf of shape (r,).
        name: of the result.
    """

    stored = False

    def __init__(self, theta: Dense, name: str) -> None:
        super().__init__(name, theta.shape)
        self.theta = theta

    @property
    def trainable(self) -> bool:
        """Whether theta is trained."""
        return self.theta.trainable

    def source(self) -> Tensor:
        """Return the selection weights, positive and of sum 1."""
        return self.theta.tensor().softmax(0)


def selected(theta: Tensor) -> int:
    """Return how many selection weights softmax(theta) are at least the mean 1/r, from 1 to r.

    Example:
        >>> selected(torch.tensor([-1.0, -2.0, -1.0])), selected(torch.ones(5))
        (2, 5)
    """
    weights = theta.double().softmax(0)
    return int((weights * len(weights) >= 1 - 1e-9).sum())


def search(
    model: nn.Module,
    training: Iterable[Any],
    validation: Iterable[Any],
    *,
    steps: int,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    lr: float = 3e-4,
    selection_lr: float = 3e-4,
    betas: tuple[float, float] = (0.5, 0.999),
) -> dict[str, int]:
    """Return the rank of every weight that the bilevel search finds; the model is left as it was.

    Args:
        model: an adapted model without gates; the rank of its active adapter is the most that a weight gets.
        training: batches of the lower level, gone through again and again.
        validation: batches of the upper level; the paper splits its training set 70 to 30.
        steps: of the search, at least 1; each runs the model four times forward and backward.
        loss: `loss(model, batch)`, where the model's output has none.
        lr: of the lower level, positive; also the rate of the step ahead.
        selection_lr: of theta.
        betas: of theta's Adam.

    Raises:
        Incompatible: a layer of the adapter has not exactly one trained product, or it has a gate.
        InvalidOption: a number is out of range, or there are no batches.
    """
    in_range("autolora's search", "[1, inf)", steps=steps)
    in_range("autolora's search", "(0, inf)", lr=lr, selection_lr=selection_lr)
    adaptation = require(model)
    adapter = adaptation.adapter()
    expressions = adaptation.expressions(adapter.name)
    pairs = {path: _only_pair(path, list(e.pairs())) for path, e in expressions.items()}
    weights = list(adaptation.trainable(adapter.name))
    before = [weight.detach().clone() for weight in weights]
    gates = {path: _gated(pair) for path, pair in pairs.items()}
    thetas = [gate.theta.value for gate in gates.values()]
    batches = zip(_endless(training, "training"), _endless(validation, "validation"), strict=True)

    def closure(batch: Batch) -> Callable[[], Tensor]:
        return lambda: _loss(model, batch, loss)

    try:
        lower = torch.optim.Adam(weights, lr=lr)
        upper = torch.optim.Adam(thetas, lr=selection_lr, betas=betas)
        for train_batch, validation_batch in itertools.islice(batches, steps):
            train_loss, validation_loss = closure(train_batch), closure(validation_batch)
            _step(upper, thetas, hypergradient(weights, thetas, train_loss, validation_loss, lr))
            _step(lower, weights, _gradients(train_loss, weights))
        return {path: selected(gate.theta.value.detach()) for path, gate in gates.items()}
    finally:
        for pair in pairs.values():
            pair.owner.remove_gate()
        _put(weights, before)


def hypergradient(
    weights: Sequence[Tensor],
    thetas: Sequence[Tensor],
    train_loss: Callable[[], Tensor],
    validation_loss: Callable[[], Tensor],
    rate: float,
) -> list[Tensor]:
    """Return the gradient of `L_val(w - rate dL_train/dw, theta)` with respect to theta.

    The product with the mixed second derivative is taken by central differences, which is exact up to
    O(eps^2) and where the training loss is quadratic.

    Args:
        weights: w, changed on the way and restored.
        thetas: what both losses also depend on.
        train_loss: evaluates the training loss at the present w and theta.
        validation_loss: the same for validation.
        rate: of the step ahead.
    """
    start = [weight.detach().clone() for weight in weights]
    try:
        _put(weights, _moved(start, _gradients(train_loss, weights), -rate))
        found = _gradients(validation_loss, [*thetas, *weights])
        direct, direction = found[: len(thetas)], found[len(thetas) :]
        norm = float(torch.stack([d.double().square().sum() for d in direction]).sum().sqrt())
        if norm == 0:
            return direct
        probe = _PROBE / norm
        _put(weights, _moved(start, direction, probe))
        ahead = _gradients(train_loss, thetas)
        _put(weights, _moved(start, direction, -probe))
        behind = _gradients(train_loss, thetas)
    finally:
        _put(weights, start)
    return [d - rate * (a - b) / (2 * probe) for d, a, b in zip(direct, ahead, behind, strict=True)]


def _only_pair(path: str, pairs: Sequence[Pair]) -> Pair:
    if len(pairs) != 1 or pairs[0].gate is not None:
        raise Incompatible(f"{path}: autolora searches the rank of one trained product without a gate")
    return pairs[0]


def _gated(pair: Pair) -> Softmax:
    """Put softmax(theta), theta = 1, between the factors of a product."""
    ones = torch.ones(pair.up.shape[-1], dtype=pair.up.tensor().dtype, device=pair.up.tensor().device)
    gate = Softmax(Dense(ones, "theta", trainable=True), "gate")
    pair.owner.insert_gate(gate)
    return gate


def _endless(batches: Iterable[Any], name: str) -> Iterator[Batch]:
    check_batches(batches)
    for index in itertools.count():
        place = -1
        for place, content in enumerate(batches):
            yield Batch(place, content, None, None)
        if place < 0:
            again = " on the second pass; give a list or a loader, not a generator" if index else ""
            raise InvalidOption(f"autolora's search was given no {name} batches{again}")


def _loss(model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    found = loss_of(model, batch, loss, needed=True)
    assert found is not None
    return found


def _gradients(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        found = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    return list(found)


def _moved(start: Sequence[Tensor], direction: Sequence[Tensor], rate: float) -> list[Tensor]:
    return [s + rate * d for s, d in zip(start, direction, strict=True)]


@torch.no_grad()
def _put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
