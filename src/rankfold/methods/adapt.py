"""Adapting a model, and saying beforehand what that would do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidOption
from ..layers import Targets, watch_first_forward
from ..layers.targets import candidates
from ..statistics import Statistics
from .calibrate import Calibration
from .prepare import Prepared, install, prepare
from .recipe import Recipe, resolve


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


def adapt(
    model: nn.Module,
    method: str | Recipe,
    *,
    rank: int | None = None,
    targets: Targets | None = None,
    name: str = "default",
    seed: int = 0,
    data: Iterable[Any] | Statistics | Mapping[str, Any] | None = None,
    lr: float | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
    train: Sequence[str] | str = (),
    uncalled: str = "error",
    removable: bool = True,
    **options: Any,
) -> nn.Module:
    """Adapt a model in place: every targeted weight becomes an expression around the weight that is there.

    Everything that is not adapted is frozen, except the modules named in `train` and a freshly initialised
    task head (`score`, `classifier`), which are trained whole. Stored weights keep their names and are never
    edited.

    Args:
        model: any module.
        method: a point such as "lora" or "dora/pissa", a recipe of the catalogue, or a `Recipe`.
        rank: of the change; None takes the method's default.
        targets: a preset ("all-linear", "attention", "mlp", "embeddings", "convolutions"), a glob over dotted
            names, a regular expression (`re:...` or compiled), or a list; None takes the method's default.
        name: of the adapter; several may live in one model.
        seed: of every random choice; the global generator is not touched.
        data: batches, for initialisers and rank rules that read statistics: dicts called as `model(**batch)`
            or tuples called as `model(*batch)`. Statistics that `collect` returned will do, and where a
            method reads several sets, a mapping of them by name.
        lr: learning rate of the training to come, for initialisers that depend on it.
        loss: `loss(model, batch)`, for statistics of gradients where the model's output has no loss.
        progress: show a progress bar while statistics are collected.
        train: modules to train whole beside the adapter; "all" trains everything that is not adapted, which
            structures that are trained from scratch do by themselves.
        uncalled: "error" raises in the first forward that leaves a targeted layer uncalled, naming it;
            "allow" does not (for experts that are not always used).
        removable: keep what `remove` needs: copies of modules trained whole, and stored weights that are not
            read any more. False saves their memory where a model is trained from scratch.
        options: of the structure, such as `alpha=32`; those of other parts are given by a recipe, such as
            `Recipe("lora", init=("lora-ga", {"gamma": 64}))`.

    Returns:
        The model.

    Raises:
        UnknownMethod, UnknownTarget, UnsupportedLayer, InvalidOption, InvalidRank, Incompatible: one sentence
            each; the model is then as it was.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = rf.adapt(model, "lora", rank=2, alpha=4)
        >>> model[0].expression
        W0[8x16] + 2 (up*[8x2] @ down*[2x16])
    """
    _check_uncalled(uncalled)
    resolved = resolve(method, options)
    prepared = prepare(
        model,
        resolved,
        rank=rank,
        targets=targets,
        name=name,
        seed=seed,
        train=train,
        calibration=Calibration(data, lr, loss, progress),
        removable=removable,
    )
    install(model, prepared)
    if uncalled == "error":
        prepared.adapter.watch = watch_first_forward(model, prepared.layers)
    for note in prepared.notes:
        warnings.warn(note, stacklevel=2)
    return model


def plan(
    model: nn.Module,
    method: str | Recipe,
    *,
    rank: int | None = None,
    targets: Targets | None = None,
    name: str = "default",
    seed: int = 0,
    data: Iterable[Any] | Statistics | Mapping[str, Any] | None = None,
    lr: float | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
    train: Sequence[str] | str = (),
    uncalled: str = "error",
    **options: Any,
) -> Plan:
    """Return what `adapt` with the same arguments would do; the model is not changed.

    The data are read only where a rank rule needs them.

    Raises:
        RankfoldError: whatever `adapt` would raise.
    """
    _check_uncalled(uncalled)
    resolved = resolve(method, options)
    prepared = prepare(
        model,
        resolved,
        rank=rank,
        targets=targets,
        name=name,
        seed=seed,
        train=train,
        blank=True,
        calibration=Calibration(data, lr, loss, progress),
    )
    sites = [_planned(prepared, path) for path in prepared.adapter.paths]
    shared = sum(t.numel() for t in prepared.shared.values() if t.requires_grad)
    whole = sum(t.numel() for t in prepared.whole.values() if isinstance(t, nn.Parameter))
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
        notes=tuple(str(note) for note in prepared.notes),
    )


def _planned(prepared: Prepared, path: str) -> PlannedSite:
    if path in prepared.branches:
        branch = prepared.branches[path]
        count = sum(p.numel() for p in branch.parameters())
        return PlannedSite(path, (0, 0), prepared.ranks[path], count, branch.formula())
    expression = prepared.expressions[path]
    shape = (expression.shape[0], expression.shape[1])
    return PlannedSite(path, shape, prepared.ranks[path], expression.count().trainable, expression.formula())


def _check_uncalled(uncalled: str) -> None:
    if uncalled not in ("error", "allow"):
        raise InvalidOption(f"uncalled must be 'error' or 'allow', not {uncalled!r}")
