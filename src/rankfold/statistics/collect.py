"""The calibration pass: every batch once through the model, every statistic that is asked for at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, Incompatible, InvalidOption, UnsupportedLayer
from ..layers import Targets
from . import storage
from .batches import Batch, Loss, Mask, check_batches, check_mask, digested, prepared
from .calibrating import Progress, calibrating, unbroken
from .finite import NotFinite
from .observer import Calls, Observer
from .reducers import Asked, HessianDiagonal, Reducer, Seen, Side, What, asked_for, whole
from .statistics import Statistics, WeightStatistics, describe
from .watched import Watched, refuse, watch


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    what: What | Sequence[What],
    *,
    targets: Targets = "all-linear",
    loss: Loss | None = None,
    mask: Mask = "padding",
    nan: str = "error",
    progress: bool = True,
    resume: str | Path | None = None,
    seed: int = 0,
    every: int = 16,
) -> Statistics:
    """Collect statistics of many weights in one pass over batches.

    This is the parallel mode: all weights are seen in the unchanged model. In the other one,
    `rankfold.statistics.sequentially`, every weight is seen behind those that were changed before it.

    The model runs in evaluation mode; modes, flags, gradients and hooks are as before afterwards. For
    statistics of inputs the first batch runs once more, to find out which weights share one. Gradients are
    consumed as they arrive: one weight's is alive at a time, but for "hessian_diagonal".

    Args:
        model: any module, adapted or not; statistics are those of the stored weights.
        batches: an iterable of mappings called as `model(**batch)`, tuples called as `model(*batch)`, or lone
            tensors; it is run through once.
        what: names of statistics, or pairs (name, options): "input_mean" (in,), "input_gram" (in, in),
            "column_norm" (in,), "input_pca" (components=k, tolerance=0.99, iterations=4), "output_mean"
            (out,), "output_gram" (out, out), "gradient" (out, in), "squared_gradient" (out, in),
            "squared_gradient_rows" (out,), "squared_gradient_columns" (in,), "sensitivity" (a scalar),
            "hessian_diagonal" (out, in; samples=1). Each is described at its class in `REDUCERS`.
        targets: as `adapt` takes them.
        loss: `loss(model, batch)` runs the model; None reads `out.loss` or `out["loss"]`.
        mask: which tokens count in statistics of activations: "padding" reads `attention_mask` (batch,
            tokens), "labels" also leaves out tokens with the label -100, None counts all, a function of the
            batch returns (batch, tokens). It is applied to activations whose first axes are (batch, tokens),
            (tokens, batch), or both as one axis of that length, the batch outside. Where there are as many
            examples as tokens, the first axis is taken for the batch. Other activations count whole.
        nan: "error", or "skip" to leave out every batch whose loss, activations or gradients are not finite;
            each batch then runs twice, once to find out.
        progress: whether to show a bar on a terminal.
        resume: a file for partial sums; the same call with the same batches continues from it and ends with
            the same numbers, bit for bit. Other batches than those that it has seen are refused.
        seed: of the probes of "hessian_diagonal".
        every: number of batches after which `resume` is written.

    Raises:
        InvalidOption: an unknown statistic or option, or no batches.
        UnknownTarget: a target matches nothing.
        UnsupportedLayer: a layer does not have a statistic.
        Incompatible: gradients are asked for and there is no loss, or `resume` holds another pass.
        BaseMismatch: `resume` holds statistics of another model.
        NotFinite: a batch is not finite; the sentence names batch and weight.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> found = collect(model, [torch.ones(4, 3), torch.zeros(4, 3)], ["input_mean", "input_gram"])
        >>> found["0"].get("input_mean")
        tensor([0.5000, 0.5000, 0.5000])
        >>> found["0"].tokens
        8
    """
    asked = _checked(batches, what, mask, nan, every)
    watched = watch(model, targets)
    refuse(watched, asked)
    work = Pass(model, watched, asked, loss=loss, mask=mask, nan=nan, seed=seed)
    return work.over(batches, progress=progress, file=None if resume is None else Path(resume), every=every)


def sequentially(
    model: nn.Module,
    batches: Iterable[Any],
    what: What | Sequence[What],
    *,
    targets: Targets = "all-linear",
    loss: Loss | None = None,
    mask: Mask = "padding",
    nan: str = "error",
    progress: bool = True,
    seed: int = 0,
) -> Iterator[tuple[list[str], Statistics]]:
    """Collect statistics of one group of weights at a time, in the order in which they are first called.

    This is the sequential mode: the caller may change the weights of a group before asking for the next one,
    whose statistics then come from the changed model. `collect` is the parallel mode. Weights that share an
    input are one group. Every group is one pass over the batches, which ends each forward as soon as the
    group was called where only statistics of activations are asked for.

    Args:
        model: as for `collect`.
        batches: as for `collect`, and can be run through many times, such as a list or a data loader.
        what: as for `collect`.
        targets: as for `collect`.
        loss: as for `collect`.
        mask: as for `collect`.
        nan: as for `collect`.
        progress: as for `collect`.
        seed: as for `collect`.

    Yields:
        The paths of a group, and their statistics.

    Raises:
        InvalidOption: as for `collect`, or the batches can be run through once only.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
        >>> for paths, found in sequentially(model, [torch.ones(4, 3)], "input_mean"):
        ...     _ = torch.nn.init.ones_(model.get_submodule(paths[0]).weight)  # changed before the next
        ...     print(paths, found[paths[0]].tokens)
        ['0'] 4
        ['1'] 4
    """
    asked = _checked(batches, what, mask, nan, 1)
    if iter(batches) is batches:
        raise InvalidOption(
            "sequentially runs through the batches once per group; pass a list, not an iterator"
        )
    watched = watch(model, targets)
    refuse(watched, asked)
    options: dict[str, Any] = {"loss": loss, "mask": mask, "nan": nan, "seed": seed}
    calls = Pass(model, watched, asked, **options).tried(batches)
    for members in _in_order(watched, calls):
        paths = [path for weight in members for path in weight.paths]
        once = all(len(calls.inputs.get(weight.path, [])) == 1 for weight in members)
        work = Pass(model, watch(model, paths), asked, stop=once, **options)
        yield [weight.path for weight in members], work.over(batches, progress=progress)


def _in_order(watched: list[Watched], calls: Calls) -> list[list[Watched]]:
    """Return the groups that share an input, first called first; weights that were not called come last."""
    order = {path: position for position, path in enumerate(calls.inputs)}
    groups: dict[str, list[Watched]] = {}
    for weight in sorted(watched, key=lambda w: order.get(w.path, len(order))):
        groups.setdefault(weight.leader.path, []).append(weight)
    return list(groups.values())


def _checked(batches: object, what: object, mask: Mask, nan: str, every: int) -> tuple[Asked, ...]:
    asked = asked_for(what)
    check_batches(batches)
    check_mask(mask)
    if nan not in ("error", "skip"):
        raise InvalidOption(f"nan must be 'error' or 'skip', not {nan!r}")
    if not whole(every, 1):
        raise InvalidOption(f"every must be a number of batches from 1, not {every!r}")
    return asked


class Pass:
    """One pass over batches: the sums, and how far it has come.

    Args:
        model: as `collect` takes it.
        watched: the weights.
        what: the statistics.
        loss: as `collect` takes it.
        mask: as `collect` takes it.
        nan: "error" or "skip".
        seed: of the probes.
        stop: whether a forward ends when every weight was called, if no gradients are asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: list[Watched],
        what: tuple[Asked, ...],
        *,
        loss: Loss | None,
        mask: Mask,
        nan: str,
        seed: int,
        stop: bool = False,
    ) -> None:
        self.model, self.watched, self.what = model, watched, what
        self.loss, self.mask, self.nan, self.seed = loss, mask, nan, seed
        self.sides: frozenset[Side] = frozenset(asked.side for asked in what)
        self.stop = stop and not self.sides & {"gradient", "curvature"}
        self.reducers = {w.path: [asked.reducer() for asked in what] for w in watched}
        self.tokens = dict.fromkeys(self.reducers, 0)
        self.batches = self.skipped = 0
        self.base = describe(model, {weight.path: weight.layer for weight in watched})
        self.grouped, self.whole, self.digest = False, True, ""

    @property
    def seen(self) -> int:
        """How many batches were taken, counted or skipped."""
        return self.batches + self.skipped

    def over(
        self, batches: Iterable[Any], *, progress: bool, file: Path | None = None, every: int = 1
    ) -> Statistics:
        """Run through the batches and return the statistics."""
        if file is not None:
            storage.check_place(file)
        if file is not None and file.exists():
            self._continue(file)
        bar = Progress(progress, length_hint(batches, 0) or None)
        try:
            with calibrating(self.model, self._trained()):
                self._take_all(batches, bar, file, every)
        except BaseException:
            if file is not None and self.whole and self.seen:
                self._write(file)
            raise
        finally:
            bar.close()
        self._check_enough()
        if file is not None:
            self._write(file)
        return self.statistics()

    def _take_all(self, batches: Iterable[Any], bar: Progress, file: Path | None, every: int) -> None:
        held = contextlib.nullcontext if file is None else unbroken
        index, start = -1, self.seen
        digest = ""
        for index, content in enumerate(batches):
            bar.step()
            if file is not None:
                digest = digested(digest, content)
            if index + 1 == start and digest != self.digest:
                raise Incompatible(f"{file} holds a pass over other batches; name another file")
            if index < start:
                continue
            with held():
                self.whole = False
                self._take(prepared(index, content, self._device(), self.mask))
                self.whole, self.digest = True, digest
            if file is not None and self.seen % every == 0:
                self._write(file)
        if index + 1 < start:
            raise Incompatible(
                f"{file} holds {start} batches and the iterable gives {index + 1}: not the same"
            )

    def _check_enough(self) -> None:
        if not self.seen:
            raise InvalidOption("there are no batches: the iterable is empty, or was used up before")
        if not self.batches:
            raise NotFinite(f"all {self.skipped} batches were skipped: none of them is finite")
        if not any(r.sums for reducers in self.reducers.values() for r in reducers):
            raise UnsupportedLayer(f"no batch reached any of the {len(self.watched)} targeted weights")

    def _trained(self) -> list[Tensor]:
        if not self.sides & {"gradient", "curvature"}:
            return []
        return [weight.layer.stored() for weight in self.watched if not weight.foreign]

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    # One batch ----------------------------------------------------------------------------------------

    def _take(self, batch: Batch) -> None:
        """Count a batch, all of it or nothing."""
        if not self.grouped and "input" in self.sides:
            self._group(batch)
        if self.nan == "skip":
            try:
                self._run(batch, lambda weight, side, seen: None)
            except NotFinite:
                self.skipped += 1
                return
        calls = self._run(batch, self._deliver)
        for weight in self.watched:
            self.tokens[weight.path] += calls.tokens.get(weight.path, 0)
        self.batches += 1

    def _run(self, batch: Batch, deliver: Any) -> Calls:
        probes = [r.samples for r in self._of(HessianDiagonal)]
        observer = Observer(
            self.model, self.watched, batch, sides=self.sides, deliver=deliver, seed=self.seed,
            probes=max(probes, default=1), stop=self.stop,
        )  # fmt: skip
        try:
            calls = observer.run(self.loss)
        except NotFinite as error:
            hint = "; pass nan='skip' to leave such batches out" if self.nan == "error" else ""
            raise NotFinite(f"batch {batch.index}: {error}{hint}") from None
        if "input" in self.sides:
            self._check_shared(calls, batch)
        return calls

    def _of(self, kind: type[HessianDiagonal]) -> list[HessianDiagonal]:
        first = next(iter(self.reducers.values()))
        return [reducer for reducer in first if isinstance(reducer, kind)]

    def _deliver(self, weight: Watched, side: Side, seen: Seen) -> None:
        for asked, reducer in zip(self.what, self.reducers[weight.path], strict=True):
            if asked.side == side:
                reducer.update(seen)

    # Shared inputs ------------------------------------------------------------------------------------

    def tried(self, batches: Iterable[Any]) -> Calls:
        """Run the first batch only to see which weights are called with which inputs."""
        for index, content in enumerate(batches):
            with calibrating(self.model, []):
                return self._group(prepared(index, content, self._device(), self.mask))
        raise InvalidOption("there are no batches: the iterable is empty")

    def _group(self, batch: Batch) -> Calls:
        """Let weights that meet the same tensors in a batch share the statistics of their input."""
        observer = Observer(
            self.model, self.watched, batch, sides=frozenset(), deliver=self._deliver, stop=self.stop
        )
        with contextlib.suppress(NotFinite):
            observer.run(self.loss)
        leaders: dict[Any, Watched] = {}
        for weight in self.watched:
            met = tuple(observer.calls.inputs.get(weight.path, ()))
            weight.leader = leaders.setdefault((met, *_geometry(weight)), weight) if met else weight
            self._share(weight, self.reducers[weight.leader.path])
        self.grouped = True
        return observer.calls

    def _share(self, weight: Watched, lent: Sequence[Reducer]) -> None:
        own = self.reducers[weight.path]
        for index, asked in enumerate(self.what):
            if asked.side == "input":
                own[index] = lent[index]

    def _check_shared(self, calls: Calls, batch: Batch) -> None:
        for weight in self.watched:
            if not calls.same_input(weight):
                raise Incompatible(
                    f"batch {batch.index}: {weight.path} and {weight.leader.path} had one input in the first "
                    "batch and have two now; collect their statistics in separate calls"
                )

    # Results and resuming -----------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """Return what was collected so far."""
        weights = {
            weight.path: WeightStatistics(
                weight.path, weight.layer.shape, self.what, tuple(self.reducers[weight.path]),
                tokens=self.tokens[weight.path], batches=self.batches, leader=weight.leader.path,
                tied=tuple(weight.paths[1:]),
            )
            for weight in self.watched
        }  # fmt: skip
        return Statistics(self.what, weights, batches=self.batches, skipped=self.skipped, base=self.base)

    def _arguments(self) -> dict[str, Any]:
        """Return what must be the same for a pass to be continued."""
        mask = "a function" if callable(self.mask) else self.mask
        return {"seed": self.seed, "mask": mask, "loss": "a function" if self.loss else None}

    def _write(self, file: Path) -> None:
        storage.save(self.statistics(), file, self._arguments() | {"batches": self.digest})

    def _continue(self, file: Path) -> None:
        """Take over the sums of a file.

        Raises:
            Incompatible: they are of other statistics, weights or arguments.
            BaseMismatch: they are of another model.
        """
        held, arguments = storage.load_with_progress(file)
        if held.asked != self.what:
            raise Incompatible(
                f"{file} holds a pass for {', '.join(map(str, held.asked))}; name another file"
            )
        if list(held) != list(self.reducers):
            raise Incompatible(f"{file} holds a pass over other weights; name another file")
        if held.base["weights"] != self.base["weights"]:
            raise BaseMismatch(f"{file} holds a pass over another model; name another file")
        for key, value in self._arguments().items():
            if arguments.get(key) != value:
                raise Incompatible(f"{file} holds a pass with {key}={arguments.get(key)!r}, not {value!r}")
        by_path = {weight.path: weight for weight in self.watched}
        for path, entry in held.items():
            self.reducers[path], self.tokens[path] = list(entry.reducers), entry.tokens
            by_path[path].leader = by_path[entry.leader]
        self.batches, self.skipped, self.grouped = held.batches, held.skipped, True
        self.digest = str(arguments.get("batches", ""))


def _geometry(weight: Watched) -> tuple[Any, ...]:
    """Return how a weight reads its input; weights that read it in different ways share nothing."""
    layer, op = weight.layer, weight.layer.op
    window = [
        getattr(op, name, None) for name in ("window", "stride", "dilation", "flat_padding", "padding_mode")
    ]
    return layer.shape[1], weight.uses[0].part, layer.looked_up, *window
