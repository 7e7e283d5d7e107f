"""Which weights a recipe reaches in a model, and which of them share one stored tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence

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

OUTPUTS = ("blocks", "gated-mlp")  # presets of modules, not of weights


def is_preset(targets: Targets | None) -> bool:
    """Say whether targets are a preset, or left to the structure, and not named weight by weight."""
    return targets is None or (isinstance(targets, str) and targets in PRESETS)


def chosen_targets(
    model: nn.Module, resolved: Resolved, targets: Targets | None, trained: Sequence[str] = ()
) -> list[Target]:
    """Return the targets of a recipe: those that match and that its structure applies to.

    A preset leaves out layers of other kinds and layers that are trained whole; layers that were asked for by
    name are refused.
    """
    traits = resolved.structure.traits
    if targets is None:
        found = chosen_targets(model, resolved, resolved.targets, trained)
        return _without(model, found, resolved)
    wanted = targets
    if traits["activations"]:
        return _activation_targets(model, wanted, resolved)
    if wanted in OUTPUTS:
        raise UnknownTarget(f"{resolved.structure.name} changes weights, and {wanted} are outputs of modules")
    found = find_targets(model, wanted)
    if is_preset(wanted):
        found = [t for t in found if not any(inside([t], path) for path in trained)] or found
    refused = [t for t in found if _layer_kind(t) not in traits["layers"]]
    if refused and (len(refused) == len(found) or not is_preset(wanted)):
        kinds = " and ".join(traits["layers"])
        raise UnsupportedLayer(f"{refused[0].path}: {resolved.structure.name} applies to {kinds} layers only")
    return [t for t in found if t not in refused]


def _without(model: nn.Module, found: list[Target], resolved: Resolved) -> list[Target]:
    """Return the targets that a recipe does not exclude by their own name or that of what they lie in."""
    if not resolved.exclude:
        return found
    left = [p for p, _ in model.named_modules() if any(matches(p, pattern) for pattern in resolved.exclude)]
    kept = [t for t in found if not any(inside([t], path) for path in left)]
    if not kept:
        raise UnknownTarget(f"{resolved.recipe.text()} excludes {found[0].path} and every other target")
    return kept


def _activation_targets(model: nn.Module, wanted: Targets, resolved: Resolved) -> list[Target]:
    if isinstance(wanted, str) and wanted in PRESETS:
        if wanted not in OUTPUTS:
            raise UnknownTarget(
                f"a method that acts on activations is attached to modules' outputs, not to {wanted!r}"
            )
        keeps, options = resolved.structure.traits["keeps"], resolved.options
        return [t for t in find_targets(model, wanted) if keeps(t.path, options)]
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
        groups.setdefault(stored_identity(target), []).append(target)
    owners = {key: _owner(groups[key], chosen) for key in dict.fromkeys(map(stored_identity, chosen))}
    lenders = list(owners.values())
    readers = [(t, owner.path) for key, owner in owners.items() for t in groups[key]]
    borrowers = [(t, path) for t, path in readers if t.path != path]
    for target, path in borrowers:
        _refuse_other_form(target, model.get_submodule(path), path, resolved)
    _refuse_hidden_ties(model, lenders, {t.path for t, _ in borrowers})
    return lenders, borrowers


def _owner(group: list[Target], chosen: list[Target]) -> Target:
    """Return which layer of one stored tensor holds its expressions: the one that does so already."""
    held = [t for t in group if _holds(t)]
    return next(t for t in (*held, *group) if t in held or t in chosen)


def _holds(target: Target) -> bool:
    module = target.module
    return isinstance(module, StructuredLayer) and not target.part and module.lender is None


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
        both = [t.path for t in targets if inside([t], path) or stored_identity(t) in stored]
        held = [p for p, m in module.named_modules() if isinstance(m, StructuredLayer) and m.adapters]
        both += [f"{path}.{p}".rstrip(".") for p in held]
        if both:
            raise Incompatible(f"{both[0]} is both adapted and trained whole (train={path!r}); choose one")


def stored_identity(target: Target) -> int:
    """Return the identity of the stored tensor of a target."""
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
            for p in owners.get(stored_identity(target), [])
            if p != target.path and not p.startswith(target.path + ".")
        }
        hidden = {p for p in others - borrowers if model.get_submodule(p) is not target.module}
        if hidden:
            path = sorted(hidden)[0]
            raise UnsupportedLayer(
                f"{target.path} shares its tensor with {path or 'the model'}, which cannot follow it"
            )
