"""A rule of merging with its options, at work on the tensors of some models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..catalogue import Method
from ..errors import Incompatible, InvalidOption
from .parts import Parts
from .sources import Sources

_Found = tuple[str, Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A rule, its options, and whether a bar shows how far it is."""

    rule: Method
    options: dict[str, Any]
    progress: bool = False

    def check(self, count: int, has_base: bool) -> None:
        """Refuse what the rule cannot merge.

        Raises:
            Incompatible: it needs a base.
            InvalidOption: it cannot take so many models.
        """
        most = self.rule.traits["most"]
        if most is not None and count > most:
            raise InvalidOption(f"{self.rule.name} merges {most} models, not {count}")
        if self.rule.traits["base"] == "needed" and not has_base:
            raise Incompatible(
                f"{self.rule.name} merges what was added to a base: pass base= (--base), the model from "
                "which all were trained"
            )

    def merged(self, sources: Sources) -> Iterator[_Found]:
        """Yield the merged tensors: name, result, and what the base, or the first model, had in its place.

        Raises:
            Incompatible: the rule gives another tensor than those of the models, or none of them.
        """
        found = self._together(sources) if self.rule.traits["whole"] else self._one_by_one(sources)
        with self.bar(len(sources.names)) as step:
            # Names of what was yielded would keep it while the next tensor is read.
            for result in found:
                yield result
                del result
                step()

    def _together(self, sources: Sources) -> Iterator[_Found]:
        waiting = dict.fromkeys(sources.names)
        for name, tensor in self.rule.build(sources, **self.options):
            if name not in waiting:
                raise Incompatible(
                    f"{self.rule.name} gave {name}, which is no tensor of the models, or twice"
                )
            if tuple(tensor.shape) != sources.shape(name):
                raise Incompatible(
                    f"{self.rule.name} gave {name} as {tuple(tensor.shape)}, not {sources.shape(name)}"
                )
            del waiting[name]
            yield name, tensor, sources.read(None if sources.has_base else 0, name)
        if waiting:
            raise Incompatible(f"{self.rule.name} gave no {next(iter(waiting))} ({len(waiting)} are missing)")

    def _one_by_one(self, sources: Sources) -> Iterator[_Found]:
        for name in sources.names:
            yield self.found(sources.parts(name))

    def found(self, parts: Parts) -> _Found:
        """Return one tensor merged: name, result, and what the base, or the first model, had in its place."""
        return parts.name, self.one(parts), parts.models[0] if parts.base is None else parts.base

    @torch.no_grad()
    def pieces(self, sources: Sources, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one tensor merged by a linear rule, flat piece by piece, with what was in its place.

        A sum of the models needs no other entries than its own.
        """
        for parts in sources.pieces(name):
            yield self._built(parts), parts.models[0] if parts.base is None else parts.base

    @torch.no_grad()
    def one(self, parts: Parts) -> Tensor:
        """Return one tensor merged; one that is infinite somewhere and alike in all models is that one."""
        everything = parts.models if parts.base is None else (parts.base, *parts.models)
        first, *rest = everything
        if not bool(first.sum().isfinite()) and all(torch.equal(first, other) for other in rest):
            return first
        return self._built(parts)

    def _built(self, parts: Parts) -> Tensor:
        try:
            result: Tensor = self.rule.build(parts, **self.options)
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise InvalidOption(
                f"{self.rule.name}: the weights {list(parts.weights)}, times what the options multiply them "
                "by, are larger than the models' numbers can be"
            ) from None
        return result

    @contextlib.contextmanager
    def bar(self, count: int) -> Iterator[Callable[[], object]]:
        """Yield what moves a bar by one tensor; without a terminal nobody watches it, and there is none."""
        with contextlib.ExitStack() as stack:
            step: Callable[[], object] = int
            if self.progress:
                with contextlib.suppress(ModuleNotFoundError):
                    from tqdm.auto import tqdm

                    bar = tqdm(desc="merging", total=count, unit=" tensors", disable=None)
                    step = stack.enter_context(bar).update
            yield step

    def coefficients(self, weights: Sequence[float]) -> list[float]:
        """Return the factor of every change in the result of a linear rule.

        A linear rule on the unit vectors e_t over the base zero gives them all at once.
        """
        count = len(weights)
        unit = tuple(torch.eye(count, dtype=torch.float64))
        base = torch.zeros(count, dtype=torch.float64)
        result: list[float] = self.one(Parts("coefficients", unit, tuple(weights), base)).tolist()
        return result
