"""What a method costs in a layer of every kind, counted on expressions that are built for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from method_examples import accepted_point, adapted
from torch import nn

import rankfold as rf
from rankfold.errors import NotDense, RankfoldError
from rankfold.layers.targets import PRESETS
from rankfold.methods.calibrate import Calibration, needed
from rankfold.methods.capacity import asked_rank, largest_rank
from rankfold.methods.prepare import prepare
from rankfold.methods.recipe import resolve

SIDE = 512  # of the weight that the state of an optimizer is counted on
TOKENS = 1024  # of a batch; some expressions are cheaper for many tokens than for one
LAYERS: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {
    "linear": ("Linear, weight 1024 x 1024", lambda: nn.Linear(1024, 1024, bias=False)),
    "convolution": (
        "Conv2d 3 x 3, 128 to 128 channels, weight 128 x 1152",
        lambda: nn.Conv2d(128, 128, 3, bias=False),
    ),
}


@dataclass(frozen=True)
class Cost:
    """What one layer costs.

    Attributes:
        layer: which, in words.
        rank: the default rank, capped to what the layer can hold; None where the method has none.
        trained: numbers that an optimizer moves, shared ones included.
        stored: numbers that `save` writes.
        macs: multiply-adds of one token in a batch of `TOKENS`, the frozen weight's included, or None where
            the change acts on activations.
        frozen: multiply-adds of the frozen layer.
    """

    layer: str
    rank: int | None
    trained: int
    stored: int
    macs: float | None
    frozen: int

    @property
    def over(self) -> float | None:
        """Multiply-adds over those of the frozen layer."""
        return None if self.macs is None else self.macs / self.frozen


def costs(method: rf.Method) -> dict[str, Cost]:
    """Return the cost of a method at its default rank, for every kind of layer that it takes."""
    recipe, found = accepted_point(method), {}
    for kind in _kinds(recipe):
        with suppress(RankfoldError):  # a method may need more than a layer, such as a whole block
            found[kind] = _cost(recipe, kind)
    return found


def _kinds(recipe: rf.Recipe) -> Iterator[str]:
    """Yield the kinds of layers that a point takes: those of its structure that its own targets mean."""
    taken = resolve(recipe, {}).structure.traits["layers"]
    preset = recipe.targets if isinstance(recipe.targets, str) and recipe.targets in PRESETS else None
    meant = "convolution" if preset == "convolutions" else "linear"  # which every other preset is about
    yield from (kind for kind in LAYERS if kind in taken and (preset is None or kind == meant))


def state_of(method: rf.Method) -> int:
    """Return how many numbers an optimizer keeps for a weight `SIDE` x `SIDE`, at its defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(SIDE, SIDE, bias=False)
        optimizer = method.build(model)
        model(torch.randn(8, SIDE)).square().mean().backward()
        optimizer.step()
    weight = next(model.parameters())
    return sum(value.numel() for value in optimizer.state[weight].values() if torch.is_tensor(value))


def why_not_folded(method: rf.Method) -> str:
    """Return the sentence with which folding is refused, or "" where it is not."""
    model = adapted(method)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what should act during training has not
            rf.fold(model)
    except NotDense as reason:
        return str(reason)
    return ""


@cache
def of_lora(kind: str) -> Cost:
    """Return what LoRA costs, which others are compared with."""
    return _cost(rf.Recipe("lora"), kind)


def _cost(recipe: rf.Recipe, kind: str) -> Cost:
    words, layer = LAYERS[kind]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # a default rank that the layer cannot hold is capped
        model = nn.Sequential(layer())
        given = _calibration(model, recipe)
        planned = rf.plan(
            model, recipe, targets=["0"], data=given.data, lr=given.learning_rate, loss=given.loss,
            progress=False,
        )  # fmt: skip
        prepared = prepare(model, resolve(recipe, {}), targets=["0"], blank=True, calibration=given)
    expression, frozen = prepared.expressions.get("0"), next(model.parameters()).numel()
    macs = None if expression is None else expression.macs(TOKENS) / TOKENS
    return Cost(words, planned.sites[0].rank, planned.trainable, planned.stored, macs, frozen)


def _calibration(model: nn.Module, recipe: rf.Recipe) -> Calibration:
    """Return a made-up batch for every set of data that the recipe reads."""
    resolved = resolve(recipe, {})
    asked = asked_rank(resolved, None)
    sets = needed(resolved, asked, largest_rank(resolved, asked))
    rate = 1e-3 if resolved.init is not None and resolved.init.traits["rate"] else None
    batches = [(_input(model),)]
    data: Any = batches if set(sets) == {""} else dict.fromkeys(sets, batches)
    return Calibration(data if sets else None, rate, _loss if sets else None, progress=False)


def _loss(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
    return model(*batch).square().mean()  # type: ignore[no-any-return]


def _input(model: nn.Module) -> torch.Tensor:
    weight = next(model.parameters())
    return torch.randn(8, *weight.shape[1:])
