"""Parameter groups: which learning rate and which weight decay every trained tensor gets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import InvalidOption
from ..layers import Adaptation, require
from ..weights import Leaf, Weight
from .recipe import Recipe, resolve
from .rules import Dynamics


def param_groups(model: nn.Module, lr: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return the parameter groups that an optimizer of an adapted model needs.

    Dynamics such as lora+ set rates by side; the gates of rank rules and vectors get no weight decay.

    Args:
        model: an adapted model; what its active adapters train is grouped, modules trained whole included.
        lr: learning rate, at least 0; a method multiplies it.
        weight_decay: of matrices, at least 0.

    Returns:
        Groups with the keys params, lr, weight_decay and name, for any optimizer of PyTorch.

    Raises:
        NotAdapted: the model holds no adapter.
        InvalidOption: a number is out of range.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), "lora/lora+", rank=2, targets="0")
        >>> [(group["name"], group["lr"]) for group in rf.param_groups(model, lr=0.5)]
        [('input', 0.5), ('output', 8.0)]
    """
    numbers: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    for what, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
            raise InvalidOption(f"{what} must be a finite number of at least 0, not {number!r}")
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for parameter, name, rate, decays in _trained(require(model)):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            groups.setdefault((name, lr * rate, weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "name": name}
        for (name, rate, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _trained(adaptation: Adaptation) -> Iterator[tuple[nn.Parameter, str, float, bool]]:
    """Yield every trained parameter with its group's name, what its rate is multiplied by, and its decay."""
    for name in adaptation.active:
        resolved = resolve(Recipe.from_dict(adaptation.adapter(name).record["recipe"]), {})
        rules = list(resolved.riding.values())
        for expression in adaptation.expressions(name).values():
            yield from _leaves(expression, rules)
        for parameter in adaptation.trainable(name):
            yield parameter, "other", 1.0, parameter.dim() > 1


def _leaves(expression: Weight, rules: list[Dynamics]) -> Iterator[tuple[nn.Parameter, str, float, bool]]:
    sides = {id(leaf): side for leaf, side in expression.sides()}
    gates = {id(pair.gate) for pair in expression.pairs() if pair.gate is not None}
    for leaf in expression.leaves():
        value = leaf.tensor()
        if isinstance(value, nn.Parameter) and value.requires_grad:
            side = sides.get(id(leaf), "")
            is_gate = id(leaf) in gates or leaf.name.endswith("gate")
            name = "gates" if is_gate else side or "other"
            yield value, name, _rate(leaf, side, expression, rules), value.dim() > 1 and not is_gate


def _rate(leaf: Leaf, side: str, expression: Weight, rules: list[Dynamics]) -> float:
    rate = 1.0
    for rule in rules:
        rate *= rule.rate(side, leaf, expression)
    return rate
