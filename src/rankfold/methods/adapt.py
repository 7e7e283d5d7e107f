"""Adapting a model: targets are planned first, expressions are built beside it, then all are put in place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption, InvalidRank, UnknownTarget, UnsupportedLayer
from ..layers import (
    PRESETS,
    Adaptation,
    Adapter,
    Branch,
    GateRule,
    StructuredLayer,
    Target,
    Targets,
    adaptation_of,
    attach,
    find_modules,
    find_targets,
    task_heads,
    watch_first_forward,
)
from ..layers.targets import attention_projection, candidates, matches
from ..weights import Pooled, Weight
from .checkpoints import Checkpoints
from .recipe import Recipe, Resolved, resolve
from .site import Planned, Site, derived_seed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class RankCapped(UserWarning):
    """A preset reached weights that are too small for the rank; they got less."""


@dataclass(frozen=True)
class PlannedSite:
    """One weight of a plan: its path, its shape (out, in), its rank and the numbers that train in it."""

    path: str
    shape: tuple[int, int]
    rank: int | None
    trainable: int
    formula: str


@dataclass(frozen=True)
class Plan:
    """What `adapt` would do.

    Attributes:
        sites: the weights that match.
        trainable: numbers that training would move, shared ones counted once, whole modules included.
        stored: numbers that `save` would write.
        train: modules that would be trained whole.
        unmatched: layers that could hold an expression and do not match.
        shared: shapes of the tensors that layers share.
        notes: ranks that were capped, ties that were followed.
    """

    sites: tuple[PlannedSite, ...]
    trainable: int
    stored: int
    train: tuple[str, ...]
    unmatched: tuple[str, ...]
    shared: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return a table."""
        width = max(len(s.path) for s in self.sites)
        lines = [f"{s.path:{width}}  {s.formula}  ({s.trainable:,} trained)" for s in self.sites]
        lines += [f"shared {key}: {'x'.join(map(str, shape))}" for key, shape in self.shared.items()]
        lines += [f"trained whole: {name}" for name in self.train]
        lines += [f"not matched: {', '.join(self.unmatched)}"] if self.unmatched else []
        lines += [*self.notes, f"{len(self.sites)} weights, {self.trainable:,} numbers to train"]
        return "\n".join(lines)


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
    ranks: dict[str, int | None]
    notes: list[str] = field(default_factory=list)


def adapt(
    model: nn.Module,
    method: str | Recipe,
    *,
    rank: int | None = None,
    targets: Targets | None = None,
    name: str = "default",
    seed: int = 0,
    data: Iterable[Any] | None = None,
    lr: float | None = None,
    train: Sequence[str] = (),
    uncalled: str = "error",
    **options: Any,
) -> nn.Module:
    """Adapt a model in place: every targeted weight becomes an expression around the weight that is there.

    Everything that is not adapted is frozen, except the modules named in `train` and a freshly initialised task
    head (`score`, `classifier`), which are trained whole. Stored weights keep their names and are never edited.

    Args:
        model: any module.
        method: a point such as "lora" or "dora/pissa", or a `Recipe`.
        rank: of the change; None takes the structure's default.
        targets: a preset ("all-linear", "attention", "mlp", "embeddings", "convolutions"), a glob over dotted
            names, a regular expression (`re:...` or compiled), or a list; None takes the structure's default.
        name: of the adapter; several may live in one model.
        seed: of every random choice; the global generator is not touched.
        data: batches, for initialisers that read statistics.
        lr: learning rate, for initialisers that depend on it.
        train: modules to train whole beside the adapter.
        uncalled: "error" raises in the first forward that leaves a targeted layer uncalled, naming it;
            "allow" does not (for experts that are not always used).
        options: of the structure, such as `alpha=32`.

    Returns:
        The model.

    Raises:
        UnknownMethod, UnknownTarget, UnsupportedLayer, InvalidOption, InvalidRank, Incompatible: one sentence each;
            the model is then as it was.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = rf.adapt(model, "lora", rank=2, alpha=4)
        >>> model[0].expression
        W0[8x16] + 2 (up*[8x2] @ down*[2x16])
    """
    if uncalled not in ("error", "allow"):
        raise InvalidOption(f"uncalled must be 'error' or 'allow', not {uncalled!r}")
    resolved = resolve(method, options)
    _refuse_data(resolved, data)
    prepared = prepare(model, resolved, rank=rank, targets=targets, name=name, seed=seed, train=train)
    install(model, prepared)
    if uncalled == "error":
        watch_first_forward(model, prepared.layers)
    for note in prepared.notes:
        warnings.warn(note, RankCapped, stacklevel=2)
    return model


def plan(
    model: nn.Module,
    method: str | Recipe,
    *,
    rank: int | None = None,
    targets: Targets | None = None,
    name: str = "default",
    seed: int = 0,
    train: Sequence[str] = (),
    **options: Any,
) -> Plan:
    """Return what `adapt` with the same arguments would do; the model is not changed.

    Raises:
        RankfoldError: whatever `adapt` would raise.
    """
    options = {key: value for key, value in options.items() if key not in ("data", "lr", "uncalled")}
    resolved = resolve(method, options)
    prepared = prepare(
        model, resolved, rank=rank, targets=targets, name=name, seed=seed, train=train, blank=True
    )
    sites = [_planned(prepared, path) for path in prepared.adapter.paths]
    shared = sum(t.numel() for t in prepared.shared.values() if t.requires_grad)
    whole = sum(p.numel() for path in prepared.train for p in model.get_submodule(path).parameters())
    stored = sum(e.count().stored for e in prepared.expressions.values())
    stored += sum(p.numel() for b in prepared.branches.values() for p in b.parameters())
    reached = {*prepared.adapter.paths, *(t.path for t, _ in prepared.borrowers)}
    return Plan(
        sites=tuple(sites),
        trainable=sum(s.trainable for s in sites) + shared + whole,
        stored=stored + sum(t.numel() for t in prepared.shared.values()) + whole,
        train=tuple(prepared.train),
        unmatched=tuple(t.path for t in candidates(model) if t.path not in reached),
        shared={key: tuple(t.shape) for key, t in prepared.shared.items()},
        notes=tuple(prepared.notes),
    )


def _planned(prepared: Prepared, path: str) -> PlannedSite:
    if path in prepared.branches:
        branch = prepared.branches[path]
        count = sum(p.numel() for p in branch.parameters())
        return PlannedSite(path, (0, 0), prepared.ranks[path], count, branch.formula())
    expression = prepared.expressions[path]
    shape = (expression.shape[0], expression.shape[1])
    return PlannedSite(path, shape, prepared.ranks[path], expression.count().trainable, expression.formula())


def _refuse_data(resolved: Resolved, data: Any) -> None:
    needs = resolved.init.traits["needs"] if resolved.init else ()
    if needs and data is None:
        raise InvalidOption(f"{resolved.init.name} reads {' and '.join(needs)}: pass data=batches")  # type: ignore[union-attr]
    if data is not None and not needs:
        raise Incompatible(f"{resolved.recipe.text()} reads no data; leave data= away")


# Preparing --------------------------------------------------------------------------------------------


def prepare(
    model: nn.Module,
    resolved: Resolved,
    *,
    rank: int | None = None,
    targets: Targets | None = None,
    name: str = "default",
    seed: int = 0,
    train: Sequence[str] = (),
    heads: bool = True,
    blank: bool = False,
    ranks: Mapping[str, int | None] | None = None,
) -> Prepared:
    """Build an adapter beside a model that is not touched.

    Args:
        model: the model.
        resolved: the recipe.
        rank, targets, name, seed, train: as for `adapt`.
        heads: add a freshly initialised task head to `train`.
        blank: build shapes only, the values will be loaded.
        ranks: the rank of every path, where it is known already.
    """
    existing = adaptation_of(model)
    _check_name(name, existing)
    adaptation = existing or Adaptation(model)
    chosen = _targets(model, resolved, targets)
    lenders, borrowers = _follow_ties(model, chosen, resolved)
    trained = find_modules(model, train)
    trained += [head for head in task_heads(model) if heads and head not in trained]
    _refuse_overlap(lenders, trained)
    layers = (
        {} if resolved.structure.traits["activations"] else {t.path: adaptation.layer_for(t) for t in lenders}
    )
    explicit = not (targets is None or (isinstance(targets, str) and targets in PRESETS))
    notes = [f"{t.path} shares its tensor with {path} and follows it" for t, path in borrowers]
    if ranks is None:
        ranks = _ranks(resolved, layers or {t.path: None for t in lenders}, rank, explicit, notes)
    sites = _sites(model, resolved, lenders, layers, seed, blank)
    planned = _plan_shared(resolved, sites, ranks, seed)
    shared = dict(planned.shared)
    key = f"{name}:{resolved.structure.name}"
    common = {
        "root": _Root(shared), "shared": {key: key for key in shared}, "gates": adaptation.carrier.gates, "gate_key": key
    }  # fmt: skip
    built = {
        path: _build(resolved, replace(site, planned=planned.sites.get(path, {}), **common), ranks[path])
        for path, site in sites.items()
    }
    for path, expression in built.items():
        reason = layers[path].refuse(expression) if path in layers else None
        if reason:
            raise UnsupportedLayer(f"{path} {reason}")
    record = _record(resolved, seed, ranks, [t.path for t in lenders], trained) | {"plan": planned.digest()}
    adapter = Adapter(name, record, resolved.structure.traits["stage"], [t.path for t in lenders])
    adapter.shared = {key: _attribute(name, key) for key in shared}
    weights = {p: b for p, b in built.items() if isinstance(b, Weight)}
    branches = {p: b for p, b in built.items() if isinstance(b, Branch)}
    gate = resolved.structure.traits["gate"]
    rules = {} if gate is None else {key: gate(**resolved.options)}
    return Prepared(
        adaptation,
        adapter,
        lenders,
        layers,
        weights,
        branches,
        borrowers,
        shared,
        rules,
        trained,
        dict(ranks),
        notes,
    )


def _check_name(name: str, existing: Adaptation | None) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidOption(f"an adapter's name has letters, digits, '-' and '_' only, not {name!r}")
    if existing is not None and name in existing.adapters:
        raise InvalidOption(
            f"the model already holds an adapter {name!r}; choose another name or remove it first"
        )


def _targets(model: nn.Module, resolved: Resolved, targets: Targets | None) -> list[Target]:
    traits = resolved.structure.traits
    wanted = traits["targets"] if targets is None else targets
    if traits["activations"]:
        return _activation_targets(model, wanted)
    found = find_targets(model, wanted)
    usable = [t for t in found if _layer_kind(t) in traits["layers"]]
    if not usable:
        kinds, path = " and ".join(traits["layers"]), found[0].path
        raise UnsupportedLayer(f"{path}: {resolved.structure.name} applies to {kinds} layers only")
    if len(usable) < len(found) and targets is not None and targets not in PRESETS.keys():
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


def _follow_ties(
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


def _refuse_overlap(targets: list[Target], trained: list[str]) -> None:
    for target in targets:
        for path in trained:
            if target.path == path or target.path.startswith(path + "."):
                raise Incompatible(
                    f"{target.path} is both adapted and trained whole (train={path!r}); choose one"
                )


def _ranks(
    resolved: Resolved,
    layers: Mapping[str, StructuredLayer | None],
    rank: int | None,
    explicit: bool,
    notes: list[str],
) -> dict[str, int | None]:
    """Return the rank of every path, checked against what the structure can hold."""
    traits, name = resolved.structure.traits, resolved.structure.name
    if traits["rank"] is None:
        if rank is not None:
            raise InvalidRank(f"{name} has no rank; leave rank= away")
        return dict.fromkeys(layers)
    wanted = traits["rank"] if rank is None else rank
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise InvalidRank(f"rank must be a whole number of at least 1, not {wanted!r}")
    multiple = traits["multiple"](resolved.options)
    if wanted % multiple:
        raise InvalidRank(f"{name}: rank {wanted} is not a multiple of {multiple}")
    shared = _shared_ranks(resolved, layers, wanted)
    limits = {p: _limit(traits, layer) for p, layer in layers.items()}
    over = [p for p in layers if limits[p] is not None and shared[p] > limits[p]]  # type: ignore[operator]
    if over and (explicit or len(over) == len(layers)):
        raise InvalidRank(_too_high(over[0], layers[over[0]], shared[over[0]], limits[over[0]]))
    result: dict[str, int | None] = {**shared}
    for path in over:
        result[path] = limits[path] // multiple * multiple  # type: ignore[operator]
        if not result[path]:
            raise InvalidRank(
                f"{path}: {name} needs a rank of at least {multiple}, more than the weight can hold"
            )
        notes.append(f"{path}: rank capped to {result[path]}, the most that its weight can hold")
    return result


def _shared_ranks(resolved: Resolved, layers: Mapping[str, Any], rank: int) -> dict[str, int]:
    if resolved.ranks is None:
        return dict.fromkeys(layers, rank)
    shared: dict[str, int] = resolved.ranks.build(layers, rank, **resolved.ranks_options)
    return shared


def _limit(traits: Mapping[str, Any], layer: StructuredLayer | None) -> int | None:
    if traits["limit"] is None or layer is None:
        return None
    return int(traits["limit"](layer.shape))


def _too_high(path: str, layer: StructuredLayer | None, rank: int, limit: int | None) -> str:
    shape = "x".join(map(str, layer.shape)) if layer is not None else "?"
    return f"{path}: rank {rank} is more than its weight ({shape}) can hold; choose rank <= {limit}"


def _sites(
    model: nn.Module,
    resolved: Resolved,
    targets: list[Target],
    layers: Mapping[str, StructuredLayer],
    seed: int,
    blank: bool,
) -> dict[str, Site]:
    initialiser = (resolved.init, resolved.init_options) if resolved.init else None
    sites = {}
    for target in targets:
        layer = layers.get(target.path)
        if layer is None:
            width = _hidden_size(model, target)
            dtype, device = _place_of(target.module)
            sites[target.path] = Site(
                target.path, None, None, (width, width), seed, blank=blank, dtype=dtype, device=device
            )
            continue
        dtype, device = _dtype_of(layer)
        base = layer.base()
        shape = layer.shape
        sites[target.path] = Site(
            target.path, layer, base, shape, seed, initialiser, blank=blank, dtype=dtype, device=device
        )
    return sites


def _dtype_of(layer: StructuredLayer) -> tuple[torch.dtype, torch.device]:
    stored = layer.original.weight if hasattr(layer.original, "weight") else layer.matrix()
    wide = getattr(stored, "dtype", None) == torch.float64
    return (torch.float64 if wide else torch.float32), stored.device  # type: ignore[union-attr,return-value]


def _place_of(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    first = next(iter(module.parameters()), torch.zeros(()))
    return (torch.float64 if first.dtype == torch.float64 else torch.float32), first.device


def _hidden_size(model: nn.Module, target: Target) -> int:
    config = getattr(model, "config", None)
    for attribute in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(getattr(config, attribute, None), int):
            return int(getattr(config, attribute))
    width = getattr(target.module, "out_features", None)
    if width is None:
        raise UnsupportedLayer(
            f"{target.path}: the width of its output is not known; its model has no hidden_size"
        )
    return int(width)


def _plan_shared(
    resolved: Resolved, sites: Mapping[str, Site], ranks: Mapping[str, int | None], seed: int
) -> Planned:
    planner = resolved.structure.traits["plan"]
    if planner is None:
        return Planned()
    made: Planned = planner(sites, ranks, seed=derived_seed(seed, "shared"), **resolved.options)
    return made


def _attribute(name: str, key: str) -> str:
    return f"rankfold_{name.replace('-', '_')}_{key}"


class _Root(nn.Module):
    """Owns the shared tensors while expressions are built beside the model."""

    def __init__(self, shared: Mapping[str, Tensor]) -> None:
        super().__init__()
        for key, tensor in shared.items():
            setattr(self, key, tensor)


def _build(resolved: Resolved, site: Site, rank: int | None) -> Weight | Branch:
    arguments = [site] if rank is None else [site, rank]
    result: Weight | Branch = resolved.structure.build(*arguments, **resolved.options)
    return result


def _record(
    resolved: Resolved, seed: int, ranks: Mapping[str, int | None], paths: list[str], trained: list[str]
) -> dict[str, Any]:
    return {
        "recipe": resolved.recipe.to_dict(),
        "seed": seed,
        "targets": paths,
        "ranks": {path: ranks[path] for path in paths},
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
    for path, branch in prepared.branches.items():
        _attach_branch(model, adapter, path, branch)
    for key, rule in prepared.gate_rules.items():
        adaptation.carrier.add(key, rule)
        adapter.gate_keys.add(key)
    adaptation.add(adapter, prepared.train)
    return adaptation


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
