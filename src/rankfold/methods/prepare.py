"""Building an adapter beside a model, and putting it in place once all of it is there."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption, UnsupportedLayer
from ..layers import (
    Adaptation,
    Adapter,
    Branch,
    GateRule,
    StructuredForeign,
    StructuredLayer,
    Target,
    Targets,
    adaptation_of,
    attach,
    find_modules,
    gated_block,
    task_heads,
)
from ..layers.targets import candidates
from ..weights import Base, Moved, Pooled, Weight
from .aim import chosen_targets, follow_ties, inside, is_preset, refuse_overlap, stored_identity
from .calibrate import Calibration, Collected, check_given, collected, needed
from .capacity import Allotment, allotted_ranks, asked_rank, largest_rank
from .checkpoints import Checkpoints
from .recipe import Resolved
from .site import OutputSite, Place, Planned, Site, derived_seed

EVERYTHING = "all"  # what `train` is called where the whole model is trained
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class TieFollowed(UserWarning):
    """A layer shares its stored tensor with an adapted one and follows it."""


@dataclass
class Prepared:
    """Everything that putting an adapter in place needs, built without touching the model."""

    adaptation: Adaptation
    adapter: Adapter
    targets: list[Target]
    layers: dict[str, StructuredLayer]
    expressions: dict[str, Weight]
    branches: dict[str, Branch]
    borrowers: list[tuple[Target, str]]
    shared: dict[str, Tensor]
    gate_rules: dict[str, GateRule]
    train: list[str]
    whole: dict[str, Tensor]
    ranks: dict[str, int | None]
    notes: list[Warning] = field(default_factory=list)


def prepare(
    model: nn.Module,
    resolved: Resolved,
    *,
    rank: int | None = None,
    targets: Targets | None = None,
    name: str = "default",
    seed: int = 0,
    train: Sequence[str] | str = (),
    heads: bool = True,
    blank: bool = False,
    allotment: Allotment | None = None,
    calibration: Calibration | None = None,
    removable: bool = True,
    stored_precision: bool = False,
    rest_frozen: bool = False,
    meta: bool = False,
) -> Prepared:
    """Build an adapter beside a model that is not touched.

    Args:
        model: the model.
        resolved: the recipe.
        rank: as for `adapt`, like the next four.
        targets: which weights.
        name: of the adapter.
        seed: of every random choice.
        train: modules to train whole, or "all".
        heads: add a freshly initialised task head to `train`.
        blank: build shapes only, the values will be loaded.
        allotment: how much rank every path gets, where it is known already.
        calibration: what the caller gives for it.
        removable: keep what going back to the base takes.
        stored_precision: leaves have the precision of the weights that they replace, not at least float32.
        rest_frozen: where everything in the model belongs to the adapter, only its expressions train.
        meta: with `blank`, the leaves take no memory until they are given values.
    """
    existing = adaptation_of(model)
    _check_name(name, existing)
    _check_seed(seed)
    _refuse_nested(model, existing)
    _refuse_on_scratch(resolved, existing, removable)
    adaptation = existing or Adaptation(model)
    everything = resolved.structure.traits["scratch"] or train in (EVERYTHING, [EVERYTHING])
    trained = [] if everything else find_modules(model, _several(train))
    lenders, borrowers = follow_ties(model, chosen_targets(model, resolved, targets, trained), resolved)
    if not everything:
        trained += [h for h in task_heads(model) if heads and h not in trained and not inside(lenders, h)]
    refuse_overlap(model, lenders, trained)
    weightless = resolved.structure.traits["activations"]
    layers = {} if weightless else {t.path: adaptation.layer_for(t) for t in lenders}
    notes: list[Warning] = [TieFollowed(f"{t.path} shares its tensor with {path}") for t, path in borrowers]
    common = {"seed": seed, "blank": blank, "gates": adaptation.carrier.gates, "hidden": _hidden(model)}
    common["known_adapters"] = tuple(adaptation.adapters)
    common |= {"stored_precision": stored_precision, "meta": meta}
    sites = _sites(model, resolved, lenders, layers, {**common, "gate_key": _gate_key(resolved, name)})
    fresh = allotment is None  # and not read from a file
    if allotment is None:
        sites = _calibrated(model, resolved, sites, rank, blank, calibration or Calibration())
        allotment = allotted_ranks(resolved, sites, rank, not is_preset(targets), notes)
    ranks, sites = allotment.ranks, _with_ranks(sites, allotment)
    planned = _plan_shared(resolved, sites, ranks, seed)
    built = {path: _build(resolved, _with_shared(site, planned), ranks[path]) for path, site in sites.items()}
    weights = {p: b for p, b in built.items() if isinstance(b, Weight)}
    _refuse_layers(layers, weights)
    for method in resolved.riding.values() if fresh else ():
        for path, expression in weights.items():
            method.suits(path, expression)
    here = [t for t in lenders if t.path in sites]
    readers = [(t, path) for t, path in borrowers if path in sites]
    whole = (
        _everything_else(model, [*here, *(t for t, _ in readers)]) if everything else _whole(model, trained)
    )
    trained = [EVERYTHING] if everything else trained
    record = _record(resolved, seed, allotment, list(sites), trained) | {"plan": planned.digest()}
    flags = {"removable": removable, "stored_precision": stored_precision, "rest_frozen": rest_frozen}
    usual = {"removable": True, "stored_precision": False, "rest_frozen": False}
    record |= {key: value for key, value in flags.items() if value != usual[key]}
    adapter = Adapter(name, record, resolved.structure.traits["stage"], list(sites))
    adapter.shared = {key: _attribute(name, key) for key in planned.shared}
    adapter.attached = blank or not resolved.acts
    adapter.scratch = resolved.structure.traits["scratch"] or not removable
    adapter.rest_frozen = rest_frozen
    return Prepared(
        adaptation=adaptation,
        adapter=adapter,
        targets=here,
        layers={path: layer for path, layer in layers.items() if path in sites},
        expressions=weights,
        branches={p: b for p, b in built.items() if isinstance(b, Branch)},
        borrowers=readers,
        shared=dict(planned.shared),
        gate_rules=_gate_rules(resolved, name),
        train=trained,
        whole=whole,
        ranks=dict(ranks),
        notes=notes,
    )


def _several(train: Sequence[str] | str) -> Sequence[str]:
    return [train] if isinstance(train, str) else train


def _whole(model: nn.Module, paths: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of modules that are trained whole, by name."""
    found: dict[str, Tensor] = {}
    for path in paths:
        module = model.get_submodule(path)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            found[f"{path}.{name}" if path else name] = tensor
    return found


def _everything_else(model: nn.Module, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, by name and once, but the weights that become expressions."""
    taken = {stored_identity(target) for target in targets}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in taken:
            taken.add(id(tensor))
            found[name] = tensor
    return found


def _refuse_on_scratch(resolved: Resolved, existing: Adaptation | None, removable: bool) -> None:
    if existing is None:
        return
    if existing.scratch is not None:
        raise Incompatible(
            f"the weights were replaced by the adapter {existing.scratch!r}, and no other change stands on "
            "it; rankfold.fold(model) first"
        )
    if resolved.structure.traits["scratch"] or not removable:
        raise Incompatible(
            f"{resolved.structure.name} would let go of the weights, and the model holds an adapter that "
            "stands on them; fold or remove it first"
        )


def _calibrated(
    model: nn.Module,
    resolved: Resolved,
    sites: dict[str, Place],
    rank: int | None,
    blank: bool,
    given: Calibration,
) -> dict[str, Place]:
    """Let every site read what its initialiser and the rank rule need from data."""
    asked = asked_rank(resolved, rank)
    sets = needed(resolved, asked, largest_rank(resolved, asked))
    check_given(resolved, sets, given)
    if blank and not (resolved.ranks and resolved.ranks.traits["needs"]):
        return sites
    read = {path: _read_there(model, site) for path, site in sites.items()}
    found = collected(model, [p for paths in read.values() for p in paths], sets, given) if sets else {}
    return {path: _informed(site, read[path], found, given) for path, site in sites.items()}


def _informed(site: Place, read: list[str], found: Collected, given: Calibration) -> Place:
    """Let a site read what was collected for it."""
    if isinstance(site, Site):
        return replace(site, statistics=found.get(site.path, {}), learning_rate=given.learning_rate)
    assert isinstance(site, OutputSite)
    return replace(site, statistics={p[len(site.path) + 1 :]: found.get(p, {}) for p in read})


def _read_there(model: nn.Module, site: Place) -> list[str]:
    """Return the weights of which statistics are taken for a site: itself, or those inside a module."""
    if isinstance(site, Site):
        return [site.path]
    return [t.path for t in candidates(model) if inside([t], site.path)]


def _with_ranks(sites: Mapping[str, Place], allotment: Allotment) -> dict[str, Place]:
    """Leave out the sites that got no rank, and tell the others what alpha is divided by."""
    kept = {path: site for path, site in sites.items() if allotment.ranks[path] != 0}
    return {
        path: replace(site, reference=allotment.references.get(path)) if isinstance(site, Site) else site
        for path, site in kept.items()
    }


def _gate_key(resolved: Resolved, name: str) -> str:
    return f"{name}:{resolved.structure.name}"


def _gate_rules(resolved: Resolved, name: str) -> dict[str, GateRule]:
    gate = resolved.structure.traits["gate"]
    return {} if gate is None else {_gate_key(resolved, name): gate(**resolved.options)}


def _refuse_layers(layers: Mapping[str, StructuredLayer], weights: Mapping[str, Weight]) -> None:
    for path, expression in weights.items():
        reason = layers[path].refuse(expression)
        if reason:
            raise UnsupportedLayer(f"{path} {reason}")


def _check_name(name: str, existing: Adaptation | None) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidOption(f"an adapter's name has letters, digits, '-' and '_' only, not {name!r}")
    if hasattr(nn.ModuleDict(), name):
        raise InvalidOption(
            f"{name!r} cannot be an adapter's name, because modules have an attribute of that name"
        )
    if existing is not None and name in existing.adapters:
        raise InvalidOption(
            f"the model already holds an adapter {name!r}; choose another name or remove it first"
        )


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
        raise InvalidOption(f"seed must be a whole number, not {seed!r}")
    try:
        operator.index(seed)
    except TypeError:
        raise InvalidOption(f"seed must be a whole number, not {seed!r}") from None


def _refuse_nested(model: nn.Module, existing: Adaptation | None) -> None:
    """Refuse a model of which a part, or which as a part of another, holds an adapter already."""
    parts = [path for path, part in model.named_modules() if path and adaptation_of(part) is not None]
    if parts:
        raise Incompatible(
            f"the part {parts[0]!r} of the model holds an adapter; adapt that part, or remove it"
        )
    layers = [path for path, part in model.named_modules() if isinstance(part, StructuredLayer)]
    if existing is None and layers:
        raise Incompatible(
            f"{layers[0]} is adapted already as a part of a larger model; adapt that model instead"
        )


def _sites(
    model: nn.Module,
    resolved: Resolved,
    targets: list[Target],
    layers: Mapping[str, StructuredLayer],
    common: Mapping[str, Any],
) -> dict[str, Place]:
    if resolved.structure.traits["activations"]:
        return {t.path: _output_site(model, t, common) for t in targets}
    return {path: _weight_site(path, layer, resolved, common) for path, layer in layers.items()}


def _weight_site(path: str, layer: StructuredLayer, resolved: Resolved, given: Mapping[str, Any]) -> Site:
    common = dict(given)
    stored = getattr(layer.original, "weight", None)
    found = stored if isinstance(stored, Tensor) else layer.matrix()
    dtype, device = _place_of(found)
    if common.pop("stored_precision") and found.is_floating_point():
        dtype = found.dtype
    if common.pop("meta"):
        device = torch.device("meta")
    moves_base = resolved.moves_base
    if moves_base and isinstance(layer, StructuredForeign):
        raise UnsupportedLayer(
            f"{path} is quantised, and moving changes into it would round them; use a layer in full precision"
        )
    return Site(
        path=path,
        layer=layer,
        base=Moved(layer, layer.matrix().detach().to(dtype)) if moves_base else layer.base(),
        shape=layer.shape,
        init=(resolved.init, resolved.init_options) if resolved.init else None,
        rule=resolved.rule,
        dtype=dtype,
        device=device,
        **common,
    )


def _output_site(model: nn.Module, target: Target, common: Mapping[str, Any]) -> OutputSite:
    first = next(target.module.parameters(), torch.zeros(()))
    dtype, device = _place_of(first)
    width = _width(model, target)
    kept = {key: value for key, value in common.items() if key not in ("stored_precision", "meta")}
    return OutputSite(path=target.path, module=target.module, width=width, dtype=dtype, device=device, **kept)


def _place_of(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return (torch.float64 if tensor.dtype == torch.float64 else torch.float32), tensor.device


def _hidden(model: nn.Module) -> int | None:
    """Return the width of a model's hidden states, where its configuration names it."""
    config = getattr(model, "config", None)
    found = [getattr(config, attribute, None) for attribute in ("hidden_size", "d_model", "n_embd", "dim")]
    return next((width for width in found if isinstance(width, int)), None)


def _width(model: nn.Module, target: Target) -> int:
    block = gated_block(target.module)
    found = [getattr(target.module, "out_features", None)]
    found += [block.projections()[2].out_features] if block else []
    width = next((w for w in [*found, _hidden(model)] if isinstance(w, int)), None)
    if width is None:
        raise UnsupportedLayer(
            f"{target.path}: the width of its output is not known; its model has no hidden_size"
        )
    return width


def _plan_shared(
    resolved: Resolved, sites: Mapping[str, Place], ranks: Mapping[str, int | None], seed: int
) -> Planned:
    planner = resolved.structure.traits["plan"]
    if planner is None:
        return Planned()
    made: Planned = planner(sites, ranks, seed=derived_seed(seed, "shared"), **resolved.options)
    return made


def _with_shared(site: Place, planned: Planned) -> Place:
    """Let a site read the shared tensors from a stand-in for the model, which is not touched yet."""
    if not isinstance(site, Site) or not planned.shared:
        return site
    root = nn.Module()
    for key, tensor in planned.shared.items():
        setattr(root, key, tensor)
    keys = {key: key for key in planned.shared}
    return replace(site, root=root, shared=keys, planned=planned.sites.get(site.path, {}))


def _attribute(name: str, key: str) -> str:
    plain = name.replace("_", "_u").replace("-", "_d")  # an attribute's name, and no two alike
    return f"rankfold_{plain}_{key}"


def _build(resolved: Resolved, site: Place, rank: int | None) -> Weight | Branch:
    arguments: list[Any] = [site] if rank is None else [site, rank]
    result: Weight | Branch = resolved.structure.build(*arguments, **resolved.options)
    if not isinstance(result, Weight | Branch):
        raise TypeError(
            f"{resolved.structure.name} returned {type(result).__name__}, not a Weight or a Branch"
        )
    for method in resolved.dynamics.values():
        if isinstance(site, Site) and isinstance(result, Weight):
            result = method.wrapped(site, result)
    return result


def _record(
    resolved: Resolved, seed: int, allotment: Allotment, paths: list[str], trained: list[str]
) -> dict[str, Any]:
    return {
        "recipe": resolved.recipe.to_dict(),
        "seed": seed,
        "targets": paths,
        "ranks": {path: allotment.ranks[path] for path in paths},
        "rank": allotment.asked,
        "references": {path: r for path, r in allotment.references.items() if path in paths},
        "train": trained,
    }


# Putting in place -------------------------------------------------------------------------------------


def install(model: nn.Module, prepared: Prepared) -> Adaptation:
    """Put a prepared adapter in place and make it the active one."""
    adaptation, adapter = prepared.adaptation, prepared.adapter
    attach(model, adaptation)
    Checkpoints.take_over(model)
    for key, tensor in prepared.shared.items():
        _register(model, adapter.shared[key], tensor)
    for path, expression in prepared.expressions.items():
        _own_pools(expression, model, adapter)
        prepared.layers[path].adapters[adapter.name] = expression.train(model.training)
    for target in prepared.targets:
        if target.path in prepared.layers:
            adaptation.place(target, prepared.layers[target.path])
    for target, lender in prepared.borrowers:
        layer = adaptation.layer_for(target)
        layer.borrow(prepared.layers[lender])
        adaptation.place(target, layer)
    if adapter.scratch:
        _let_go(adaptation, prepared)
    for path, branch in prepared.branches.items():
        _attach_branch(model, adapter, path, branch)
    for key, rule in prepared.gate_rules.items():
        adaptation.carrier.add(key, rule)
        if hasattr(rule, "own"):
            rule.own(model, adapter.name, adapter.shared)
        adapter.gate_keys.add(key)
    adaptation.add(adapter, prepared.whole)
    return adaptation


def _let_go(adaptation: Adaptation, prepared: Prepared) -> None:
    """Let go of stored weights that no expression reads."""
    unread = {
        path
        for path, expression in prepared.expressions.items()
        if all(isinstance(leaf, Moved) for leaf in expression.leaves() if isinstance(leaf, Base))
    }
    followers = {target.path for target, lender in prepared.borrowers if lender in unread}
    for path in (*sorted(unread), *sorted(followers)):
        adaptation.layers[path].release()


def _register(model: nn.Module, attribute: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        model.register_parameter(attribute, nn.Parameter(tensor.detach()))
    else:
        model.register_buffer(attribute, tensor)


def _own_pools(expression: Weight, model: nn.Module, adapter: Adapter) -> None:
    for leaf in expression.leaves():
        if isinstance(leaf, Pooled):
            leaf.own(model, adapter.shared[leaf.key])


def _attach_branch(model: nn.Module, adapter: Adapter, path: str, branch: Branch) -> None:
    module = model.get_submodule(path)
    module.add_module(_attribute(adapter.name, "branch"), branch)
    handle = module.register_forward_hook(branch.hook, prepend=True)
    adapter.branches[path] = (branch, handle)
