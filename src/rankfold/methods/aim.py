"""Which weights a recipe reaches in a model, and which of them share one stored tensor."""

from __future__ import annotations

import re

from torch import nn

from ..errors import Incompatible, UnknownTarget, UnsupportedLayer
from ..layers import (
    PRESETS,
    StructuredLayer,
    StructuredTransposedLinear,
    Target,
    Targets,
    find_targets,
    kind_of,
)
from ..layers.targets import attention_projection, candidates, matches, own_modules
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
    if len(usable) < len(found) and not (isinstance(wanted, str) and wanted in PRESETS):
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
        for p, m in own_modules(model).items()
        if any(matches(p, pattern) for pattern in patterns)
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
    groups: dict[int, list[Target]] = {}
    for target in candidates(model):
        groups.setdefault(_stored(target), []).append(target)
    owners = {key: _owner(groups[key], chosen) for key in dict.fromkeys(map(_stored, chosen))}
    lenders = list(owners.values())
    borrowers = [(t, owner.path) for key, owner in owners.items() for t in groups[key] if t.path != owner.path]
    for target, path in borrowers:
        _refuse_other_form(target, model.get_submodule(path), path, resolved)
    _refuse_hidden_ties(model, lenders, {t.path for t, _ in borrowers})
    return lenders, borrowers


def _owner(group: list[Target], chosen: list[Target]) -> Target:
    """Return which of the layers with one stored tensor holds its expressions: the one that does so already."""
    held = [t for t in group if isinstance(t.module, StructuredLayer) and not t.part and t.module.lender is None]
    paths = {t.path for t in chosen}
    return next(t for t in (*held, *group) if t.path in paths or t in held)


def _refuse_other_form(target: Target, owner: nn.Module, path: str, resolved: Resolved) -> None:
    """Refuse a tie to a layer that the structure does not apply to, or that reads the tensor transposed."""
    if _layer_kind(target) not in resolved.structure.traits["layers"]:
        reason = f"{resolved.structure.name} does not apply to it"
    elif _transposed(target.module) != _transposed(owner):
        reason = "it reads it transposed"
    else:
        return
    raise UnsupportedLayer(f"{path} shares its tensor with {target.path}, which cannot follow it: {reason}")


def _transposed(module: nn.Module) -> bool:
    original = module.original if isinstance(module, StructuredLayer) else module
    return kind_of(original) is StructuredTransposedLinear


def inside(targets: list[Target], path: str) -> list[Target]:
    """Return the targets that are, or lie inside, the module at a path."""
    return [t for t in targets if t.path == path or t.path.startswith(path + ".")]


def refuse_overlap(model: nn.Module, targets: list[Target], trained: list[str]) -> None:
    """Refuse a tensor that is to be trained whole and is adapted too, by these targets or by another adapter.

    Raises:
        Incompatible: there is one.
    """
    for path in trained:
        module = model.get_submodule(path)
        stored = {id(p) for p in module.parameters()}
        both = [t.path for t in targets if inside([t], path) or _stored(t) in stored]
        held = [p for p, m in module.named_modules() if isinstance(m, StructuredLayer) and m.adapters]
        both += [f"{path}.{p}".rstrip(".") for p in held]
        if both:
            raise Incompatible(f"{both[0]} is both adapted and trained whole (train={path!r}); choose one")


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
