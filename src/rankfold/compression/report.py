"""What a compression did, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One targeted weight.

    Attributes:
        weight: its path.
        shape: (out, in).
        rank: of its factors; None where it has none.
        kept: numbers that remain.
        error: of the weight, relative, in the method's metric; 0 where it stayed as it was.
        plain_error: relative Frobenius error.
        spectrum: singular values in the method's metric, relative to the largest, at most 256 of them evenly
            spaced; empty where the method has none.
        note: what else is to be known.
        spacing: every how many singular values one is in `spectrum`.
    """

    weight: str
    shape: tuple[int, int]
    rank: int | None
    kept: int
    error: float
    plain_error: float
    spectrum: tuple[float, ...] = ()
    note: str = ""
    spacing: int = 1

    @property
    def dense(self) -> int:
        """Numbers that there were."""
        return self.shape[0] * self.shape[1]


@dataclass
class CompressionReport:
    """What a compression did.

    Attributes:
        method: its name.
        options: of the method.
        keep: share of the targeted weights' numbers that was asked for.
        rows: the targeted weights, in the order of the model.
        seconds: that it took.
        notes: what else is to be known, as sentences.
        facts: further measurements, by name.
    """

    method: str
    options: Mapping[str, Any]
    keep: float
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Share of the targeted weights' numbers that remains."""
        return sum(row.kept for row in self.rows) / max(1, sum(row.dense for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "keep": self.keep,
            "kept": self.kept,
            "seconds": self.seconds,
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
            **self.facts,
        }

    def __str__(self) -> str:
        """Return a table."""
        width = max((len(row.weight) for row in self.rows), default=0)
        lines = [_line(row, width) for row in self.rows]
        before, after = sum(row.dense for row in self.rows), sum(row.kept for row in self.rows)
        tail = f"{len(self.rows)} weights: {before:,} numbers became {after:,} ({100 * self.kept:.1f} %)"
        return "\n".join([*lines, f"{tail}, {self.method}, {self.seconds:.1f} s", *self.notes])


def _line(row: Row, width: int) -> str:
    shape = f"{row.shape[0]}x{row.shape[1]}"
    rank = "" if row.rank is None else f"rank {row.rank}"
    rank = "as it was" if row.rank is None and row.kept == row.dense else rank
    share = f"{100 * row.kept / row.dense:5.1f} %"
    errors = f"error {row.error:.3f} ({row.plain_error:.3f})"
    return f"{row.weight:<{width}}  {shape:>11}  {rank:>9}  {share}  {errors}  {row.note}".rstrip()


def sampled(spectrum: Any, most: int = 256) -> tuple[float, ...]:
    """Return singular values relative to the largest, at most so many, evenly spaced.

    Example:
        >>> import torch
        >>> sampled(torch.tensor([4.0, 2.0, 1.0]))
        (1.0, 0.5, 0.25)
    """
    if not len(spectrum) or not float(spectrum[0]):
        return ()
    step = spacing(spectrum, most)
    return tuple(float(f"{value:.4g}") for value in (spectrum[::step] / spectrum[0]).tolist())


def spacing(spectrum: Any, most: int = 256) -> int:
    """Return every how many singular values `sampled` takes one.

    Example:
        >>> spacing(range(600))
        3
    """
    return max(1, -(-len(spectrum) // most))
