"""Merging the statistics of several processes, one sum at a time."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from safetensors.torch import load as unpacked
from safetensors.torch import save as packed

from .reducers import Reducer
from .statistics import Statistics, check_alike, joint_leaders
from .storage import parse, record_of


def gather(statistics: Statistics) -> Statistics:
    """Return the merged statistics of all processes, in each of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return statistics
    records = _from_all(record_of(statistics))
    check_alike([parse(record, {}) for record in records])
    weights = [record["weights"] for record in records]
    leaders = joint_leaders([{path: known[path]["leader"] for path in statistics} for known in weights])
    merged: dict[str, tuple[Reducer, ...]] = {}
    for path, entry in statistics.items():
        lent = merged[leaders[path]] if leaders[path] != path else None
        merged[path] = tuple(
            lent[i] if lent is not None and own.side == "input" else _merged(own, entry.shape)
            for i, own in enumerate(entry.reducers)
        )
    return statistics.rebuilt(
        merged, leaders,
        tokens={path: sum(known[path]["tokens"] for known in weights) for path in statistics},
        batches=sum(record["batches"] for record in records),
        skipped=sum(record["skipped"] for record in records),
    )  # fmt: skip


def _merged(own: Reducer, shape: tuple[int, int]) -> Reducer:
    """Return the sums of one statistic over all processes, added in the order of their ranks."""
    sums = {key: value.detach().cpu().contiguous() for key, value in own.sums.items()}
    total: Reducer | None = None
    for data in _from_all(packed(sums)):
        part = own.copy()
        part.restore(unpacked(data), *shape)
        if total is None:
            total = part
        else:
            total.merge(part)
    assert total is not None
    return total


def _from_all(value: Any) -> list[Any]:
    """Return what every process has, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
