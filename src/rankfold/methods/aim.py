"""Which weights a recipe reaches in a model, and which of them share one stored tensor."""

from __future__ import annotations

import re

from torch import nn

from ..errors import UnknownTarget, UnsupportedLayer
from ..layers import PRESETS, StructuredLayer, Target, Targets, find_targets
from ..layers.targets import attention_projection, candidates, matches
from .recipe import Resolved


def chosen_targets(model: nn.Module, resolved: Resolved, targets: Targets | None) -> list[Target]:
    """Return the targets of a recipe: those that match and that its structure applies to.

    A preset leaves layers of other kinds out; layers that were asked for by name are refused.
    """
    traits = resolved.structure.traits
    wanted = traits["targets"] if targets is None else targets
    if traits["activations"]:
        return _activation_targets(model, wanted)
    found = find_targets(model, wanted)
    usable = [t for t in found if _layer_kind(t) in traits["layers"]]
    if not usable:
        kinds, path = " and ".join(traits["layers"]), found[0].path
        raise UnsupportedLayer(f"{path}: {resolved.structure.name} applies to {kinds} layers only")
    if len(usable) < len(found) and targets is not None and targets not in PRESETS:
        left = next(t.path for t in found if t not in usable)
        raise UnsupportedLayer(
            f"{left}: {resolved.structure.name} applies to {' and '.join(traits['layers'])} layers only"
        )
    return usable


def _activation_targets(model: nn.Module, wanted: Targets) -> list[Target]:
    if isinstance(wanted, str) and wanted in PRESETS:
        if wanted != "blocks":
            raise UnknownTarget(
                f"a method that acts on activations is attached to modules' outputs, not to {wanted!r}"
            )
        return find_targets(model, wanted)
    patterns = [wanted] if isinstance(wanted, str | re.Pattern) else list(wanted)
    found = [
        Target(p, m)
        for p, m in model.named_modules()
        if p and any(matches(p, pattern) for pattern in patterns)
    ]
    if not found:
        raise UnknownTarget(f"targets {patterns} match no module of {type(model).__name__}")
    return found


def _layer_kind(target: Target) -> str:
    module = target.module.original if isinstance(target.module, StructuredLayer) else target.module
    if attention_projection(target):
        return "attention"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "convolution" if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else "linear"


def follow_ties(
    model: nn.Module, chosen: list[Target], resolved: Resolved
) -> tuple[list[Target], list[tuple[Target, str]]]:
    """Return the targets that own an expression, and those that share a stored tensor with one of them."""
    if resolved.structure.traits["activations"]:
        return chosen, []
    first: dict[int, Target] = {}
    for target in chosen:
        first.setdefault(_stored(target), target)
    lenders = [t for t in chosen if first[_stored(t)] is t]
    taken = {t.path for t in lenders}
    borrowers = [
        (t, first[_stored(t)].path) for t in candidates(model) if t.path not in taken and _stored(t) in first
    ]
    _refuse_hidden_ties(model, lenders, {t.path for t, _ in borrowers})
    return lenders, borrowers


def _stored(target: Target) -> int:
    if target.part == "in_proj":
        return id(target.module._parameters.get("in_proj_weight"))
    module = target.module.out_proj if target.part else target.module
    return id(module._parameters.get("weight"))  # type: ignore[union-attr]


def _refuse_hidden_ties(model: nn.Module, lenders: list[Target], borrowers: set[str]) -> None:
    """Refuse a stored tensor that some module reads without being able to hold an expression."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    for target in lenders:
        if target.part:
            continue
        others = {
            p
            for p in owners.get(_stored(target), [])
            if p != target.path and not p.startswith(target.path + ".")
        }
        hidden = {p for p in others - borrowers if model.get_submodule(p) is not target.module}
        if hidden:
            path = sorted(hidden)[0]
            raise UnsupportedLayer(
                f"{target.path} shares its tensor with {path or 'the model'}, which cannot follow it"
            )
