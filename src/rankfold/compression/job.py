"""Compressing a model: statistics, ranks, factors, and the factors in the places of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..catalogue import Method
from ..errors import Incompatible, InvalidOption, UnsupportedLayer
from ..layers import StructuredConv, StructuredEmbedding, StructuredLayer, Targets, adaptation_of
from ..methods.aim import is_preset
from ..methods.replace import replace
from ..statistics import Statistics
from ..statistics.calibrating import Progress
from ..statistics.finite import require_finite
from ..statistics.watched import Watched, watch
from .ledger import Ledger, digest
from .measuring import Suffered, Undo, biases_of, stand_in
from .objective import Objective, Site, Solved, nested, solved, spectrum_of
from .registry import Need, compressor_named, needs_of
from .report import CompressionReport, Row, sampled, spacing
from .shares import Share, Unit, share_named, shared
from .task import Loss, Task, calibrated, one_by_one, require_tokens

GRAMS = {"input_gram", "input_covariance"}  # as many tokens as inputs make them regular


def compress(
    model: nn.Module,
    method: str,
    *,
    keep: float | None = None,
    data: Iterable[Any] | Statistics | None = None,
    targets: Targets | None = None,
    share: str | tuple[str, Mapping[str, Any]] | None = None,
    calibration: str | None = None,
    solver: str | None = None,
    original: nn.Module | None = None,
    loss: Loss | None = None,
    few_tokens: str = "error",
    memory: float | None = None,
    seed: int = 0,
    progress: bool = True,
    folder: str | Path | None = None,
    report: Callable[[CompressionReport], object] | None = None,
    **options: Any,
) -> nn.Module:
    """Compress a model in place: weights become products of two smaller ones, or what the method says.

    Everything that is not compressed stays as it is, and everything trains afterwards, unless the method
    freezes it. `rankfold.save` and `load` hold the compressed model whole; `rankfold.fold` multiplies the
    factors out into a stock model, for evaluation.

    Args:
        model: any module.
        method: of the catalogue's axis compress, such as "svd", "fwsvd" or "svd-llm".
        keep: share of the targeted weights' numbers that may remain, in (0, 1]; None takes 0.7. Methods that
            give back what was lost, or have a budget of bits, take none.
        data: calibration batches, for methods that read statistics: dicts called as `model(**batch)` or
            tuples called as `model(*batch)`; or the `Statistics` that `collect` returned.
        targets: which weights, as `adapt` takes them; None takes the method's own, mostly "all-linear".
        share: how the parameters are shared out over the weights: "uniform", "error", ..., or a pair (name,
            options); None takes the method's own.
        calibration: "parallel" (all statistics are those of the model as it was) or "sequential" (every
            weight's inputs come from the weights that are compressed before it); None takes the method's own.
        solver: "exact", which None takes, or "randomised", which is several times faster on large weights.
        original: the model before it was compressed, for methods that compensate what was lost.
        loss: `loss(model, batch)`, for statistics of gradients where the model's output has no loss.
        few_tokens: "error" refuses calibration data of fewer tokens than a weight has inputs; "allow" does
            not.
        memory: bytes that the statistics of one pass over the data may take; None takes all weights in one
            pass.
        seed: of every random choice.
        progress: show a bar.
        folder: where what is solved is kept, so that the same call goes on after an interruption; None keeps
            it in memory.
        report: called with the `CompressionReport`, such as `print`.
        options: of the method.

    Returns:
        The model; it is as it was if an error is raised.

    Raises:
        UnknownMethod, UnknownTarget, UnsupportedLayer, InvalidOption, Incompatible: one sentence each.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> rf.compress(model, "svd", keep=0.5, targets="0", progress=False)[0].expression
        (up*[16x4] @ down*[4x16])
    """
    found = compressor_named(method)
    _check_kinds(model, original, share)
    way = {"share": share, "calibration": calibration, "solver": solver, "memory": memory, "folder": folder}
    _check(0.7 if keep is None else keep, calibration, solver, few_tokens)
    _refuse_unread(found, keep, original, way)
    checked, began = found.checked(options), time.perf_counter()
    keep = 0.7 if keep is None else keep
    task = Task(
        model, float(keep), found.traits["targets"] if targets is None else targets, _held(data), loss, seed,
        progress,
        CompressionReport(found.name, checked, keep), original, few_tokens,
    )  # fmt: skip
    if found.traits["whole"]:
        found.build(task, **checked)
    else:
        work = Work(found, checked, task, share or found.traits["share"], solver or "exact", memory)
        work.run(calibration or found.traits["calibration"], None if folder is None else Path(folder))
    task.report.seconds = time.perf_counter() - began
    if report is not None:
        report(task.report)
    return model


def _refuse_unread(method: Method, keep: float | None, original: object, way: Mapping[str, Any]) -> None:
    """Refuse what a method would not read."""
    given = [key for key, value in way.items() if value is not None]
    if method.traits["whole"] and given:
        raise InvalidOption(f"{method.name} goes its own way through the model; leave {given[0]}= away")
    share = way["share"] or method.traits["share"]
    name = share if isinstance(share, str) else share[0]
    if not method.traits["whole"] and share_named(name).free and keep is not None:
        raise InvalidOption(f"the share {name!r} decides by itself how much remains; leave keep= away")
    if original is not None and not method.traits["compensates"]:
        raise InvalidOption(f"{method.name} compensates no earlier compression; leave original= away")
    if not method.traits["shrinks"] and keep is not None:
        raise InvalidOption(f"{method.name} keeps no share of the numbers; leave keep= away")


def _check(keep: Any, calibration: str | None, solver: str | None, few_tokens: str) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise InvalidOption(f"keep is the share of the numbers that remain, in (0, 1], not {keep!r}")
    if calibration not in (None, "parallel", "sequential"):
        raise InvalidOption(f"calibration must be 'parallel' or 'sequential', not {calibration!r}")
    if solver not in (None, "exact", "randomised"):
        raise InvalidOption(f"solver must be 'exact' or 'randomised', not {solver!r}")
    if few_tokens not in ("error", "allow"):
        raise InvalidOption(f"few_tokens must be 'error' or 'allow', not {few_tokens!r}")


def _check_kinds(model: Any, original: Any, share: Any) -> None:
    for value in [model] if original is None else [model, original]:
        if not isinstance(value, nn.Module):
            raise InvalidOption(f"compress takes a model that is loaded, an nn.Module, not {value!r}")
    pair = isinstance(share, tuple | list) and len(share) == 2 and isinstance(share[0], str)
    if not (share is None or isinstance(share, str) or (pair and isinstance(share[1], Mapping))):
        raise InvalidOption(f"share must be a name or a pair (name, options), not {share!r}")


def _held(data: Iterable[Any] | Statistics | None) -> Sequence[Any] | Statistics | None:
    if data is None or isinstance(data, Statistics):
        return data
    return list(data)


class Work:
    """A compression weight by weight.

    Args:
        method: says which error is made smallest, or solves for leaves of its own.
        options: of the method.
        task: what is asked for.
        share: how parameters are shared out.
        solver: of the factors.
        memory: bytes of statistics in one pass.
    """

    def __init__(
        self,
        method: Method,
        options: Mapping[str, Any],
        task: Task,
        share: str | tuple[str, Mapping[str, Any]],
        solver: str,
        memory: float | None,
    ) -> None:
        name, rest = (share, {}) if isinstance(share, str) else share
        self.share: Share = share_named(name)
        self.share_options = dict(rest)
        self.method, self.options, self.task = method, options, task
        self.solver, self.memory = solver, memory
        self.needs = needs_of(method, options)
        self.lookups = needs_of(method, options, lookups=True)
        self.update = method.traits["update"](options)
        if method.traits["per_sample"](options) and task.data is not None:
            self.task = changed(task, data=one_by_one(task.data))
        self.weights = targeted(task, method)
        self.shapes = {weight.path: weight.layer.shape for weight in self.weights}
        reads = any(self.lookups if w.layer.looked_up else self.needs for w in self.weights)
        if reads and task.data is None:
            raise InvalidOption(f"{method.name} reads statistics of activations or gradients; pass data=")

    # The order of things ------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, calibration: str, folder: Path | None) -> None:
        """Solve every weight and put what was found into the model."""
        sequential = calibration == "sequential" and bool(self.needs)
        ledger = Ledger(folder, {} if folder is None else self._plan(calibration))
        ranks = ledger.ranks or self._ranks()
        ledger.ranks = ranks
        chosen = [weight for weight in self.weights if ranks[weight.path] is not None]
        with Undo(ledger.folder) as undo:
            for weight, found in self._solutions(chosen, ranks, ledger, sequential):
                ledger[weight.path] = found
                if sequential:
                    stand_in(weight, found, undo)
        if self.update is not None and not sequential:
            with Undo(ledger.folder) as undo:
                for weight, found in self._updates(chosen, ledger):
                    ledger[_updated(weight.path)] = found
                    stand_in(weight, found, undo)
        final = {w.path: _updated(w.path) if _updated(w.path) in ledger else w.path for w in chosen}
        self._install(chosen, ledger, final)
        self._report(ledger, final)

    def _plan(self, calibration: str) -> dict[str, Any]:
        """Return what must be the same for a compression to be continued."""
        return {
            "method": self.method.name, "options": dict(self.options), "keep": self.task.keep,
            "share": self.share.name, "share_options": self.share_options, "calibration": calibration,
            "solver": self.solver, "seed": self.task.seed,
            "weights": {path: list(shape) for path, shape in self.shapes.items()},
            "weights (sha256)": digest([weight.layer.stored() for weight in self.weights]),
            "tensors of the data (sha256)": digest(self.task.data),  # of collected statistics, of nothing
        }  # fmt: skip

    def _ranks(self) -> dict[str, int | None]:
        """Share the parameters out; rules that read spectra take those of the model as it is."""
        spectra: dict[str, Tensor] = {}
        if self.share.spectra and self.task.keep < 1:
            with _bar(self.task, len(self.weights), "spectra") as bar:
                for weight, site in self._sites(self.weights, sequential=False):
                    spectra[weight.path] = spectrum_of(site, self._objective(site))
                    bar.step()
        measures = self._measures() if self.share.measures and self.task.keep < 1 else {}
        units = [
            Unit(w.path, self.shapes[w.path], spectra.get(w.path), measure=measures.get(w.path))
            for w in self.weights
        ]
        return shared(self.share, units, self.task.keep, self.share_options)

    def _measures(self) -> dict[str, Callable[[int], float]]:
        """Return, by path, what the model's output suffers where one weight alone has a rank."""
        suffered = Suffered(self.task)
        return {
            weight.path: partial(suffered.where, weight, self._every_rank(site))
            for weight, site in self._sites(self.weights, sequential=False)
        }

    def _every_rank(self, site: Site) -> Callable[[int], Solved]:
        """Return what solves a weight for any rank, decomposing it once."""
        if self.method.traits["solves"]:
            return partial(self._solved, site)
        return nested(site, self._objective(site))

    def _sites(self, weights: Sequence[Watched], *, sequential: bool) -> Iterator[tuple[Watched, Site]]:
        """Yield the weights with their statistics; first those that are looked up."""
        for lookups, needs in ((True, self.lookups), (False, self.needs)):
            own = [weight for weight in weights if weight.layer.looked_up == lookups]
            groups = calibrated(self.task, own, needs, sequential=sequential, memory=self.memory)
            for members, found in groups if own else ():
                for weight in members:
                    if found is not None:
                        self._check_tokens(weight, found, needs)
                    of_weight = None if found is None else found[weight.path]
                    yield weight, Site(weight.path, weight.layer, of_weight, self.task.seed)

    def _updates(self, chosen: Sequence[Watched], ledger: Ledger) -> Iterator[tuple[Watched, Solved]]:
        """Yield what the second stage makes of every weight, each behind those that had it already."""
        assert self.update is not None
        done = [weight for weight in chosen if _updated(weight.path) in ledger]
        for weight in done:
            yield weight, ledger[_updated(weight.path)]
        left = [weight for weight in chosen if weight not in done]
        with _bar(self.task, len(left), f"{self.method.name}, second stage") as bar:
            for weight, site in self._sites(left, sequential=True) if left else ():
                found = self.update(site, ledger[weight.path])
                yield weight, found.to(weight.layer.stored().dtype)
                bar.step()

    def _solutions(
        self, chosen: Sequence[Watched], ranks: Mapping[str, int | None], ledger: Ledger, sequential: bool
    ) -> Iterator[tuple[Watched, Solved]]:
        """Yield every weight that is not solved yet; in sequence, those that are come first and again."""
        done = [weight for weight in chosen if weight.path in ledger]
        for weight in done if sequential else ():
            yield weight, ledger[weight.path]
        left = [weight for weight in chosen if weight not in done]
        with _bar(self.task, len(chosen), f"{self.method.name}") as bar:
            for _ in done:
                bar.step()
            for weight, site in self._sites(left, sequential=sequential) if left else ():
                rank = ranks[weight.path]
                assert rank is not None
                yield weight, self._solved(site, rank).to(weight.layer.stored().dtype)
                bar.step()

    def _solved(self, site: Site, rank: int) -> Solved:
        if self.method.traits["solves"]:
            result: Solved = self.method.build(site, rank, **self.options)
            return result
        found, finish = solved(site, self._objective(site), rank, self.solver), self.method.traits["finish"]
        return found if finish is None else finish(site, found, **self.options)

    def _objective(self, site: Site) -> Objective:
        objective: Objective = self.method.build(site, **self.options)
        if objective.mean is not None and site.bias is None and not objective.add_bias:
            return changed(objective, mean=None)
        return objective

    def _check_tokens(self, weight: Watched, found: Statistics, needs: Sequence[Need]) -> None:
        names = {need if isinstance(need, str) else need[0] for need in needs}
        if names & GRAMS:
            require_tokens(self.task, weight.path, weight.layer.shape[1], found[weight.path].tokens)

    # The result ---------------------------------------------------------------------------------------

    def _install(self, chosen: Sequence[Watched], ledger: Ledger, final: Mapping[str, str]) -> None:
        if not chosen:
            self.task.report.notes.append("nothing was compressed: keep leaves every weight as it was")
            return
        traits, ranks = self.method.traits, ledger.ranks
        assert ranks is not None
        structure = traits["structure"]
        shifts = {path: ledger[key].shift for path, key in final.items()}
        replace(
            self.task.model,
            structure(self.options) if callable(structure) else (structure, {}),
            {weight.path: ranks[weight.path] for weight in chosen},
            lambda path: ledger[final[path]].leaves,
            rest_frozen=traits["rest_frozen"],
            seed=self.task.seed,
            record={"compressed": self._record()},
            biases=[w.path for w in chosen if shifts[w.path] is not None and not biases_of(w)],
        )
        for weight in chosen:
            shift = shifts[weight.path]
            if shift is not None:
                for bias in biases_of(weight):
                    bias.add_(shift.to(bias))

    def _record(self) -> dict[str, Any]:
        """Return what a saved file says of how it came to be."""
        about = {"method": self.method.name, "title": self.method.title, "keep": self.task.keep}
        return {**about, "options": dict(self.options), "share": self.share.name}

    def _report(self, ledger: Ledger, final: Mapping[str, str]) -> None:
        for weight in self.weights:
            shape = self.shapes[weight.path]
            if weight.path not in final:
                self.task.report.rows.append(Row(weight.path, shape, None, shape[0] * shape[1], 0.0, 0.0))
                continue
            found = ledger[final[weight.path]]
            kept = sum(value.numel() for value in found.leaves.values())
            self.task.report.rows.append(
                Row(
                    weight.path,
                    shape,
                    found.rank,
                    kept,
                    found.error,
                    found.plain_error,
                    sampled(found.spectrum),
                    spacing=spacing(found.spectrum),
                )
            )
        report = self.task.report
        if report.kept > self.task.keep * (1 + 1e-9) and not self.share.free:
            report.notes.append(
                f"{100 * report.kept:.1f} % of the numbers remain, more than keep={self.task.keep:g}: the "
                f"share {self.share.name!r} found no ranks that take less"
            )


def targeted(task: Task, method: Method) -> list[Watched]:
    """Return the targeted weights, checked; a preset leaves out kinds that the method does not apply to.

    Raises:
        Incompatible: the model holds an adapter.
        UnsupportedLayer: a weight that was named, or every one of a preset, is of such a kind.
        InvalidOption: a weight holds NaN or infinite entries.
    """
    refuse_adapted(task.model)
    found, kinds = watch(task.model, task.targets), method.traits["layers"]
    refused = [weight for weight in found if weight.foreign or _kind(weight.layer) not in kinds]
    if refused and (len(refused) == len(found) or not is_preset(task.targets)):
        first = refused[0]
        what = "quantised" if first.foreign else f"of the kind {_kind(first.layer)}"
        raise UnsupportedLayer(
            f"{first.path} is {what}; {method.name} applies to plain {' and '.join(kinds)} layers"
        )
    if refused:
        names = ", ".join(weight.path for weight in refused)
        task.report.notes.append(f"left as they were, {method.name} does not apply to them: {names}")
    weights = [weight for weight in found if weight not in refused]
    for weight in weights:
        require_finite(weight.layer.matrix().detach(), f"{weight.path}: the weight")
    return weights


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a model whose weights are expressions already.

    Raises:
        Incompatible: it is one.
    """
    if adaptation_of(model) is not None:
        raise Incompatible(
            "the model holds an adapter or was compressed already; rankfold.fold(model) first, then compress"
        )


def _kind(layer: StructuredLayer) -> str:
    if isinstance(layer, StructuredEmbedding):
        return "embedding"
    if isinstance(layer, StructuredConv):
        return "convolution"
    return "attention" if layer.materialised else "linear"


def _updated(path: str) -> str:
    """Return under which name a ledger has the second stage of a weight."""
    return f"{path}:updated"


class _bar:  # noqa: N801  # used as a function
    """A progress bar for a block."""

    def __init__(self, task: Task, total: int, text: str) -> None:
        self.bar = Progress(task.progress, total, text)

    def __enter__(self) -> Progress:
        return self.bar

    def __exit__(self, *_: object) -> None:
        self.bar.close()
