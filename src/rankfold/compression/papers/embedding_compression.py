"""Embedding compression: ways to a smaller table side by side, at one budget, and the best in place.

    min over ways of sum_tables sum_x p_x ||E[x] - E'[x]||^2   such that bytes(E') <= keep bytes(E)

Zhang et al. 2023 compare 14 methods: between features, ids share parameters, by a fixed code (compoemb, tt-
rec, robe, DHE) or one that is found (mgqe, adaptemb, Dedup); within features every row gets smaller, by
integers (integer-table, ALPT), by dimensions (mde, AutoDim, OptEmbed) or by pruning (DeepLight, AutoSrh,
PEP); hashing is the baseline. Here those that can be fitted to a given table are compared by their error, p_x
being how often a row is met in the data, or alike without data. Codes, orders and scales count in bytes.

Deviations: their measure is a model that is trained again with each; train on after this, too. Left out: DHE
has no table to fit, its network is trained; AutoDim, OptEmbed, AutoSrh, PEP and ALPT search, prune or round
while they train; DeepLight prunes single numbers while it trains, and each that stays needs an index of its
own, so that at most half of the bytes are numbers; Dedup merges rows that training made alike, and trains
them again.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import InvalidOption, near_names
from ...statistics.watched import Watched
from ..registry import compressor
from ..tables import Fitted, NoRoom, Room, Way, fit_tables, frequencies, install, room_of, tables_of
from ..task import Task
from .adaptemb import FrequentFirst
from .compoemb import Composed
from .hashing_trick import Hashing
from .integer_table import Rounded
from .mde import MixedDimensions
from .mgqe import Quantised
from .robe import OffsetBlocks
from .tt_rec import Train

WAYS: dict[str, type[Way]] = {
    "adaptemb": FrequentFirst, "compoemb": Composed, "hashing-trick": Hashing, "integer-table": Rounded,
    "mde": MixedDimensions, "mgqe": Quantised, "robe": OffsetBlocks, "tt-rec": Train,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tried:
    """What one way made of the tables.

    Attributes:
        name: of the way.
        way: itself.
        room: that it had.
        found: the tables, by path.
        refused: those without enough room.
        seconds: that it took.
    """

    name: str
    way: Way
    room: Room
    found: Mapping[str, Fitted]
    refused: Mapping[str, NoRoom]
    seconds: float

    def error(self, sizes: Mapping[str, float]) -> float:
        """Return the squared error of all tables together, given their squared lengths."""
        return sum(fit.error**2 * sizes[path] for path, fit in self.found.items())

    def facts(self) -> dict[str, Any]:
        """Return it as plain data."""
        tables = {
            path: {"kept": fit.kept, "error": fit.error, "plain_error": fit.plain_error}
            for path, fit in self.found.items()
        }
        return {"tables": tables, "seconds": self.seconds}


@compressor(
    "embedding-compression",
    title="Experimental Analysis of Large-scale Learnable Vector Storage Compression",
    year=2023,
    arxiv="2311.15578",
    code="HugoZHL/Hetu",
    formula="min over ways of sum_x p_x ||E[x] - E'[x]||^2 such that bytes(E') <= keep bytes(E)",
    whole=True,
    layers=("embedding",),
    targets="embeddings",
)
def embedding_compression(task: Task, *, ways: Sequence[str] = tuple(WAYS)) -> None:
    """Compare ways to smaller tables, and replace the tables by the best.

    Args:
        task: the model, and data to count ids in, or none; `keep` is the share of every table's bytes.
        ways: names of those that are compared, each with its usual options.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 16))
        >>> options = {"ways": ["compoemb", "robe", "integer-table"], "keep": 0.4, "progress": False}
        >>> rf.compress(model, "embedding-compression", **options)[0].expression
        integers(integers[100x16], scales*[100x1])
    """
    unknown = [name for name in ways if name not in WAYS]
    if unknown or not ways:
        hint = near_names(unknown[0], WAYS) if unknown else ""
        what = f"{unknown[0]!r} is none of the ways" if unknown else "ways names nothing to compare"
        raise InvalidOption(f"embedding-compression: {what}{hint or '; known: ' + ', '.join(WAYS)}")
    weights = tables_of(task)
    known = frequencies(task, weights)
    tried = [_tried(task, name, weights, known) for name in ways]
    sizes = {w.path: float(w.layer.matrix().detach().float().square().sum()) for w in weights}
    best = min(tried, key=lambda each: (-len(each.found), each.error(sizes)))
    if best.refused and not best.found:
        raise next(iter(best.refused.values()))
    task.report.facts["ways"] = {each.name: each.facts() for each in tried if each.found}
    task.report.notes += [_line(each, best) for each in tried]
    install(task, weights, best.name, best.way, best.room, best.found)


def _tried(task: Task, name: str, weights: Sequence[Watched], known: Mapping[str, Tensor]) -> Tried:
    way = OffsetBlocks(seed=task.seed) if name == "robe" else WAYS[name]()
    room, began = room_of(task, weights, way, known), time.perf_counter()
    found, refused = fit_tables(task, weights, way, room, known)
    return Tried(name, way, room, found, refused, time.perf_counter() - began)


def _line(each: Tried, best: Tried) -> str:
    if not each.found:
        return f"{each.name}: {next(iter(each.refused.values()), 'nothing to compress')}"
    errors = ", ".join(f"{path} {fit.error:.3f} ({fit.kept:,})" for path, fit in each.found.items())
    return f"{each.name}: error (numbers) of {errors}{', in place' if each is best else ''}"
