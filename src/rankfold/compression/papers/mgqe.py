"""MGQE, multi-granular quantised embeddings: every part of a row is one of a few centroids.

    E[x] = [C_1[c_x1], ..., C_P[c_xP]],   C_p (K, d / P),   c_xp < K for frequent ids, < K' for rare ones

Kang et al. 2020, over the product quantisation of Chen et al. 2019 (DPQ), which has K' = K (theirs is 32). K
= 256 for the frequent tenth of the ids and K' = 64 for the others, who share the first 64 centroids. P
divides d and is the largest that fits. Codes are stored as one byte each and are frozen; centroids train. Of
a given table they are found by k-means in every part (Lloyd 1982), from rows evenly spaced in the table. Ids
are counted in data; without, ids stand for their places, as where a tokenizer numbers by frequency. Start,
from scratch: the same of the usual start.

Deviations: in training from scratch they learn the codes, too, by a straight-through estimate and a
commitment loss; here codes are found once. They count six bits for the code of a rare id, which is a byte
here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...methods.limits import in_range
from ...methods.registry import not_base, structure
from ...methods.site import Site
from ...weights import Dense, Weight
from ...weights.tables import Codes
from ..registry import compressor
from ..tables import Room, Shape, Sizes, Way, no_room, replace_tables, table_from_scratch
from ..task import Task

ABOUT: dict[str, Any] = {
    "title": "Learning Multi-granular Quantized Embeddings for Large-Vocab Categorical Features in "
    "Recommender Systems",
    "year": 2020,
    "arxiv": "2002.08530",
    "formula": "E[x] = [C_1[c_x1], ..., C_P[c_xP]]",
}
BATCH = 4096  # rows whose distances are held at once
SAMPLE = 32  # rows for every centroid, from which centroids are found
Groups = list[tuple[Tensor, int]]  # ids, and among how many centroids they choose


@dataclass(frozen=True)
class Quantised(Way):
    """Codes and centroids."""

    centroids: int = 256
    rare_centroids: int = 64
    frequent: float = 0.1
    rounds: int = 15

    def sizes(self, shape: Shape, room: Room) -> Sizes:
        """Return the shapes of codes and centroids."""
        if not 1 <= self.rare_centroids <= self.centroids <= 256 or self.rounds < 1:
            raise InvalidOption(
                "mgqe: rare_centroids must be at least 1 and at most centroids, these at most 256, and "
                f"rounds at least 1, not {self.rare_centroids}, {self.centroids} and {self.rounds}"
            )
        in_range("mgqe", "[0, 1]", frequent=self.frequent)
        rows, width = shape
        count = min(self.centroids, rows)
        budget = room.numbers(shape) - count * width
        parts = [p for p in range(1, width + 1) if width % p == 0 and room.of_bits(rows * p, 8) <= budget]
        if not parts:
            raise no_room(room, shape, room.of_bits(rows, 8) + count * width)
        sizes: Sizes = {"codes": ((rows, parts[-1]), torch.uint8)}
        return {**sizes, "centroids": ((parts[-1], count, width // parts[-1]), None)}

    def fit(self, table: Tensor, room: Room, order: Tensor) -> dict[str, Tensor]:
        """Return both, by k-means."""
        parts, count, _ = self.sizes((table.shape[0], table.shape[1]), room)["centroids"][0]
        few, first = min(self.rare_centroids, count), max(count, int(self.frequent * len(table)))
        by_place = order.argsort()
        groups = [(by_place[:first], count), (by_place[first:], few)]
        found = [self._clustered(part, groups) for part in table.chunk(parts, 1)]
        codes, centroids = zip(*found, strict=True)
        return {"codes": torch.stack(codes, 1), "centroids": torch.stack(centroids)}

    def _clustered(self, points: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """Return the codes (n,) and the centroids (K, width) of one part."""
        (frequent, count), (_, few) = groups
        starts = torch.cat(
            [spaced(torch.cat([ids for ids, _ in groups]), few), spaced(frequent, count - few)]
        )
        centroids = points[starts].clone()
        sample = [(points[spaced(ids, SAMPLE * allowed)], allowed) for ids, allowed in groups]
        seen = torch.cat([part for part, _ in sample])
        for _ in range(self.rounds):
            codes = torch.cat([nearest(part, centroids[:allowed]) for part, allowed in sample])
            total = torch.zeros_like(centroids).index_add_(0, codes, seen)
            times = torch.bincount(codes, minlength=count)[:, None]
            centroids = torch.where(times > 0, total / times.clamp_min(1), centroids)
        codes = torch.zeros(len(points), dtype=torch.uint8, device=points.device)
        for ids, allowed in groups:
            codes[ids] = nearest(points[ids], centroids[:allowed]).to(torch.uint8)
        return codes, centroids

    def weight(self, leaves: Mapping[str, Dense], shape: Shape) -> Weight:
        """Return the centroids that the codes name."""
        return Codes(leaves["codes"], leaves["centroids"])


def spaced(ids: Tensor, count: int) -> Tensor:
    """Return so many ids, evenly spaced, or all of them where there are fewer.

    Example:
        >>> spaced(torch.arange(10), 3)
        tensor([1, 5, 8])
    """
    if len(ids) <= count:
        return ids
    return ids[((torch.arange(count, device=ids.device) + 0.5) * (len(ids) / max(1, count))).long()]


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid of every point.

    Args:
        points: (n, width).
        centroids: (K, width).
    """
    sizes = centroids.square().sum(1)
    found = [torch.addmm(sizes, part, centroids.T, alpha=-2).argmin(1) for part in points.split(BATCH)]
    return torch.cat(found)


@structure(
    "mgqe",
    **ABOUT,
    start=not_base("that of every table quantised"),
    rank=None,
    layers=("embedding",),
    targets="embeddings",
    scratch=True,
    example={"keep": 0.8, "centroids": 4, "rare_centroids": 2},
)
def mgqe(
    site: Site,
    *,
    keep: float = 0.25,
    bits: int = 32,
    centroids: int = 256,
    rare_centroids: int = 64,
    frequent: float = 0.1,
    rounds: int = 15,
) -> Weight:
    """Return the centroids that the codes name.

    Args:
        site: the table.
        keep: share of the table's bytes, in (0, 1].
        bits: of a number of the table.
        centroids: K, at most 256.
        rare_centroids: K', at most K.
        frequent: share of the ids that choose among all K, in [0, 1].
        rounds: of k-means.
    """
    way = Quantised(centroids, rare_centroids, frequent, rounds)
    return table_from_scratch(site, way, keep, bits)


@compressor(
    "mgqe",
    **ABOUT,
    whole=True,
    layers=("embedding",),
    targets="embeddings",
    example={"centroids": 4, "rare_centroids": 2},
)
def compress(
    task: Task, *, centroids: int = 256, rare_centroids: int = 64, frequent: float = 0.1, rounds: int = 15
) -> None:
    """Replace tables by codes and centroids.

    Args:
        task: the model, and data to count ids in, or none; `keep` is the share of every table's bytes.
        centroids: K, at most 256.
        rare_centroids: K', at most K.
        frequent: share of the ids that choose among all K, in [0, 1].
        rounds: of k-means.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(400, 8))
        >>> options = {"centroids": 16, "rare_centroids": 4}
        >>> rf.compress(model, "mgqe", keep=0.25, progress=False, **options)[0].expression
        codes(codes[400x4], centroids*[4x16x2])
    """
    replace_tables(task, "mgqe", Quantised(centroids, rare_centroids, frequent, rounds))
