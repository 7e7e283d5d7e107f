"""What a calibration pass returns: the collected statistics of every weight, by its path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import BaseMismatch, Incompatible, InvalidOption, RankfoldError, near_names
from ..formats import native
from ..layers import StructuredLayer
from .reducers import Asked, Reducer
from .watched import layers_at


class NotCollected(RankfoldError, KeyError):
    """A statistic or a weight was asked for that the calibration pass did not collect."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote the sentence


class WeightStatistics:
    """What was collected of one weight.

    Args:
        path: of the weight.
        shape: (out, in) of its matrix.
        what: the statistics, one for each reducer.
        reducers: their sums; weights that share an input share those of its statistics.
        tokens: rows that the weight met, without masked ones.
        batches: that were counted.
        leader: the path under which the sums of the shared input are stored.
        tied: further paths of the same stored weight.
    """

    def __init__(
        self,
        path: str,
        shape: tuple[int, int],
        what: tuple[Asked, ...],
        reducers: tuple[Reducer, ...],
        *,
        tokens: int = 0,
        batches: int = 0,
        leader: str | None = None,
        tied: tuple[str, ...] = (),
    ) -> None:
        self.path, self.shape, self.what, self.reducers = path, shape, what, reducers
        self.tokens, self.batches, self.leader, self.tied = tokens, batches, leader or path, tied

    def __contains__(self, name: object) -> bool:
        return any(asked.name == name for asked in self.what)

    def get(self, name: str, **options: Any) -> Any:
        """Return a statistic.

        Args:
            name: as it was asked for.
            **options: those by which it was asked for; needed only to tell two of one name apart.

        Returns:
            A tensor in float32 or better, or `PrincipalComponents` for "input_pca".

        Raises:
            NotCollected: it was not asked for, or no batch reached the weight.
            InvalidOption: the options leave several to choose from.
        """
        found = [i for i, asked in enumerate(self.what) if asked.matches(name, options)]
        if not found:
            wanted = str(Asked(name, options))
            listed = ", ".join(map(str, self.what))
            raise NotCollected(f"{self.path}: {wanted} was not collected; there is {listed}")
        if len(found) > 1:
            listed = ", ".join(str(self.what[i]) for i in found)
            raise InvalidOption(f"{self.path}: {name} was collected as {listed}; say which by its options")
        chosen = self.reducers[found[0]]
        if not chosen.sums or not int(chosen.sums.get("count", 1)):
            side = "gradient" if chosen.side in ("gradient", "curvature") else "token"
            raise NotCollected(f"{self.path}: no {side} of any batch reached it, so it has no {name}")
        return chosen.value(self.batches)

    @property
    def shares_input(self) -> bool:
        """Whether the statistics of its input are stored under another weight's path."""
        return self.leader != self.path

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.what))
        return f"WeightStatistics({self.path}, {self.shape[0]}x{self.shape[1]}, {names})"


class Statistics(Mapping[str, WeightStatistics]):
    """The statistics of a calibration pass, by the path of the weight.

    A tied weight has one entry, which is found by each of its paths and listed by the first.

    Args:
        what: the statistics.
        weights: what was collected, by path.
        batches: that were counted.
        skipped: batches that were left out because they were not finite.
        base: by which numbers the model is known again.
    """

    def __init__(
        self,
        what: tuple[Asked, ...],
        weights: Mapping[str, WeightStatistics],
        *,
        batches: int,
        skipped: int,
        base: Mapping[str, Any],
    ) -> None:
        self.asked, self.batches, self.skipped, self.base = what, batches, skipped, dict(base)
        self._weights = dict(weights)
        self._tied = {path: entry for entry in weights.values() for path in entry.tied}

    @property
    def what(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """The statistics as (name, options), defaults filled in; `collect` takes the same."""
        return tuple((asked.name, dict(asked.options)) for asked in self.asked)

    def __getitem__(self, path: str) -> WeightStatistics:
        entry = self._weights.get(path) or self._tied.get(path)
        if entry is None:
            near = near_names(path, self._weights) or f"; there are {', '.join(list(self._weights)[:12])}"
            raise NotCollected(f"nothing was collected of {path!r}{near}")
        return entry

    def __contains__(self, path: object) -> bool:
        return path in self._weights or path in self._tied

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def nbytes(self) -> int:
        """Memory of all sums; those that weights share count once."""
        kept = {id(r): r for entry in self.values() for r in entry.reducers}
        return sum(value.nbytes for r in kept.values() for value in r.sums.values())

    def __str__(self) -> str:
        skipped = f" ({self.skipped} skipped)" if self.skipped else ""
        head = (
            f"{', '.join(map(str, self.asked))} of {len(self)} weights over {self.batches} batches{skipped}"
        )
        width = max((len(path) for path in self), default=0)
        lines = [f"{head}, {_size(self.nbytes)}"]
        for path, entry in self.items():
            shape = f"{entry.shape[0]}x{entry.shape[1]}"
            shared = f"  input as {entry.leader}" if entry.shares_input else ""
            lines.append(f"  {path:<{width}}  {shape:>11}  {entry.tokens:>9} tokens{shared}")
        return "\n".join(lines)

    __repr__ = __str__

    def check(self, model: nn.Module) -> None:
        """Compare a model with the one that the statistics were collected of, by shapes and a few numbers.

        Raises:
            BaseMismatch: a weight is missing, has another shape, or has other numbers.
        """
        layers = layers_at(model, self)
        for path, entry in self.items():
            if path not in layers:
                raise BaseMismatch(f"these statistics are of another model: it has a weight {path}")
            if layers[path].shape != entry.shape:
                here, there = ("x".join(map(str, shape)) for shape in (layers[path].shape, entry.shape))
                raise BaseMismatch(
                    f"these statistics are of another model: {path} is {here} here, {there} there"
                )
        try:
            native.check_base({"base": self.base}, layers)
        except BaseMismatch as error:
            reason = str(error).rpartition(": ")[2]
            raise BaseMismatch(f"these statistics are of another model: {reason}") from None

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, complete or not at all."""
        from .storage import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Statistics:
        """Read a file that `save` wrote; nothing in it is run.

        Raises:
            MissingPath: there is no such file.
            FormatError: it is truncated, changed, or of another format.
        """
        from .storage import load

        return load(Path(path))

    @staticmethod
    def merge(first: Statistics, *others: Statistics) -> Statistics:
        """Return the statistics of several parts of one pass, as if one pass had seen all batches.

        Sums add up, so the order of merging does not matter beyond rounding; "input_pca" stacks components,
        which is exact where it keeps as many as there are features.

        Raises:
            Incompatible: they are not of the same statistics and weights of the same model.
        """
        parts = (first, *others)
        check_alike(parts)
        leaders = joint_leaders([{path: entry.leader for path, entry in part.items()} for part in parts])
        merged: dict[str, tuple[Reducer, ...]] = {}
        for path in first:
            lent = merged[leaders[path]] if leaders[path] != path else None
            merged[path] = tuple(
                lent[i]
                if lent is not None and asked.side == "input"
                else _summed(p[path].reducers[i] for p in parts)
                for i, asked in enumerate(first.asked)
            )
        return first.rebuilt(
            merged, leaders,
            tokens={path: sum(part[path].tokens for part in parts) for path in first},
            batches=sum(part.batches for part in parts), skipped=sum(part.skipped for part in parts),
        )  # fmt: skip

    def rebuilt(
        self,
        reducers: Mapping[str, tuple[Reducer, ...]],
        leaders: Mapping[str, str],
        *,
        tokens: Mapping[str, int],
        batches: int,
        skipped: int,
    ) -> Statistics:
        """Return statistics of the same weights with other sums."""
        weights = {
            path: WeightStatistics(
                path, entry.shape, entry.what, reducers[path],
                tokens=tokens[path], batches=batches, leader=leaders[path], tied=entry.tied,
            )
            for path, entry in self.items()
        }  # fmt: skip
        return Statistics(self.asked, weights, batches=batches, skipped=skipped, base=self.base)

    def gather(self) -> Statistics:
        """Return, in every process of the default process group, the merged statistics of all of them.

        Without a process group these are the statistics themselves.

        Raises:
            Incompatible: processes collected different statistics, or of different models.
        """
        from .distributed import gather

        return gather(self)


def _summed(parts: Iterable[Reducer]) -> Reducer:
    total, *rest = parts
    total = total.copy()
    for part in rest:
        total.merge(part)
    return total


def joint_leaders(leaders: list[dict[str, str]]) -> dict[str, str]:
    """Return who leads whom where weights share an input in every part."""
    found: dict[tuple[str, ...], str] = {}
    return {path: found.setdefault(tuple(part[path] for part in leaders), path) for path in leaders[0]}


def check_alike(parts: Iterable[Statistics]) -> None:
    """Refuse to add up what does not belong together.

    Raises:
        Incompatible: statistics, weights or models differ.
    """
    first, *others = parts
    for other in others:
        if other.asked != first.asked:
            mine, theirs = (", ".join(map(str, part.asked)) for part in (first, other))
            raise Incompatible(f"statistics of {mine} and of {theirs} do not add up")
        if list(other) != list(first):
            apart = sorted(set(first) ^ set(other)) or ["their order"]
            raise Incompatible(f"the statistics are of different weights: {apart[0]} is not in both")
        if other.base["weights"] != first.base["weights"]:
            raise Incompatible("the statistics are of different models: the weights' numbers differ")


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def describe(model: nn.Module, layers: Mapping[str, StructuredLayer]) -> dict[str, Any]:
    """Return the numbers by which a model is known again."""
    return native.base_of(model, layers)
