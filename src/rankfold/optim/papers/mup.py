"""muP: initialisation, output and learning rates so scaled that the best ones do not move with width.

    w = width / width of the base
                     input, bias, gain    hidden                  output      reader
    root mean sq.    of the base          of the base / sqrt(w)   of the base   of the base / sqrt(w)
    input divided by 1                    1                       w           1
    Adam: lr times   1                    1/w                     1           1/w
    SGD: lr times    w                    w_out / w_in            w           1/w
    decay times      1 over the factor of lr, so lr wd stays

Yang et al. 2022. A matrix is hidden where both of its sides grow against the base, and an input where only
what it writes grows (embeddings, first layers). What reads a growing side into a fixed one is an output
where `mup_model` has divided its input by w, and otherwise a reader, which is the same in another form: the
right factor A (r, in) of a product of fixed rank is one, its left factor B (out, r) is an input, so that
lr_A ~ 1/in and lr_B ~ 1; where the rank grows with the width both are hidden. Sides that grow are those
that differ from the base, so at the base's width all factors are 1. Groups for any optimizer of PyTorch;
`mup_model` does what is not the optimizer's, once, on a model that has just been built. Start: `mup_model`
leaves a model of the base's width as it is, bit for bit, and scales the parameters of others.

Deviations: widths come from one base model and no second one, as `base` and the model differ where they
grow; tensors keep the distribution they are drawn from and are scaled by what they measure; decay is kept
from growing under SGD, too, as in the official code. Logits of attention are scaled only where a module has
`head_dim` and `scaling`, as in Transformers; elsewhere q.k / d_head is the model's own code. What a
schedule multiplies must be these rates, each by the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidOption
from ..recipes import optimizer
from ..widths import (
    HIDDEN,
    INPUT,
    OUTPUT,
    READER,
    Base,
    Width,
    divided,
    embedding_tables,
    head_ratios,
    widths,
)

USE = {
    "use": "Gives the groups of parameters that any optimizer of PyTorch takes; call `rf.optim.mup_model` "
    "on the new model before.",
    "cost": "None: rates and decays of groups are numbers.",
}


@optimizer(
    "mup",
    title="Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
    year=2022,
    arxiv="2203.03466",
    code="microsoft/mup",
    formula="lr(hidden) = lr / w, logits = U x / w, w = width / width of the base",
    traits=USE,
)
def mup(
    model: nn.Module,
    lr: float = 1e-3,
    *,
    base: Base,
    weight_decay: float = 0.0,
    rule: str = "adam",
) -> list[dict[str, Any]]:
    """Return parameter groups.

    Args:
        model: of any width.
        lr: learning rate at the base's width.
        base: the same model at the width that rates were chosen for, or the shapes of its parameters.
        weight_decay: at the base's width, as it is multiplied by lr.
        rule: "adam", for optimizers that normalise each entry, or "sgd".

    Raises:
        Incompatible: the base has other parameters, or a head that shares the table of an embedding has no
            multiplier.
        InvalidOption: there is no such rule.

    Example:
        >>> import torch, rankfold as rf
        >>> build = lambda d: torch.nn.Sequential(torch.nn.Linear(8, d), torch.nn.Linear(d, d))
        >>> groups = rf.optim.mup(build(64), 1e-3, base=build(16))
        >>> [(group["name"], group["lr"]) for group in groups]
        [('input', 0.001), ('hidden', 0.00025)]
    """
    if rule not in ("adam", "sgd"):
        raise InvalidOption(f"mup: rule must be 'adam' or 'sgd', not {rule!r}")
    rates = [(each, _rate(each, rule)) for each in widths(model, base)]
    return grouped((e.kind, e.name, e.parameter, lr * f, weight_decay / f) for e, f in rates)


def grouped(rated: Iterable[tuple[str, str, nn.Parameter, float, float]]) -> list[dict[str, Any]]:
    """Return groups with the keys params, lr, weight_decay and name.

    Args:
        rated: kind, name, parameter, learning rate and decay of each.
    """
    made: dict[tuple[str, float, float], list[tuple[str, nn.Parameter]]] = {}
    for kind, name, parameter, rate, decay in rated:
        made.setdefault((kind, rate, decay), []).append((name, parameter))
    return [
        {"params": pairs, "lr": rate, "weight_decay": decay, "name": kind}
        for (kind, rate, decay), pairs in made.items()
    ]


def _rate(each: Width, rule: str) -> float:
    """Return what the learning rate is multiplied by."""
    adam = {INPUT: 1.0, OUTPUT: 1.0, HIDDEN: 1 / each.fan_in, READER: 1 / each.fan_in}
    sgd = {
        INPUT: each.width,
        OUTPUT: each.width,
        HIDDEN: each.fan_out / each.fan_in,
        READER: 1 / each.fan_in,
    }
    return (adam if rule == "adam" else sgd)[each.kind]


def mup_model(model: nn.Module, base: nn.Module, *, zero_output: bool = False) -> nn.Module:
    """Start a model as muP does, in place: scale its parameters, divide what its heads read, and logits.

    Args:
        model: has just been built, at any width.
        base: the same model at its base width, as it is built.
        zero_output: start heads that share no table at zero, which the paper recommends.

    Returns:
        The model.

    Raises:
        Incompatible: the base has other parameters.

    Example:
        >>> build = lambda d: nn.ModuleDict({"up": nn.Linear(8, d), "lm_head": nn.Linear(d, 8)})
        >>> mup_model(build(64), build(16))["lm_head"].width_ratio
        4.0
    """
    heads = [(head, ratio) for head, ratio in head_ratios(model, base) if ratio != 1]
    for head, ratio in heads:
        divided(head, ratio)
    found, smaller = list(widths(model, base)), dict(base.named_parameters())
    if any(each.is_wide for each in found):
        for each in found:
            _rescale(each, smaller[each.name])
        _scale_logits(model, base)
    embeddings = embedding_tables(model)
    for name, parameter in model.named_parameters():
        if zero_output and name not in embeddings and any(parameter is head.weight for head, _ in heads):
            nn.init.zeros_(parameter)
    return model


@torch.no_grad()
def _rescale(each: Width, small: Tensor) -> None:
    """Give a parameter the root mean square of the base's, divided by sqrt(w) where it reads a wide side."""
    measured = float(each.parameter.square().mean().sqrt())
    wanted = float(small.square().mean().sqrt())
    if each.kind in (HIDDEN, READER):
        wanted /= math.sqrt(each.fan_in)
    if measured:
        each.parameter.mul_(wanted / measured)


def _scale_logits(model: nn.Module, base: nn.Module) -> None:
    """Let the logits of attention fall with d_head and not with its root, as they are at the base's."""
    smaller = dict(base.named_modules())
    for path, module in model.named_modules():
        small = smaller.get(path)
        if isinstance(getattr(module, "scaling", None), float) and hasattr(module, "head_dim"):
            module.scaling = small.scaling * small.head_dim / module.head_dim  # type: ignore[union-attr]
