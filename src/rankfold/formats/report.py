"""What an export did, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """What an export did.

    Attributes:
        format: "peft", "portable", "gguf" or "dense".
        path: the folder or file.
        method: peft's name of the method that was written, "" outside its format.
        rows: per weight: its path `weight`, the `rank` written, whether it is `exact`, the relative
            Frobenius `error` of the change and, where data weighed it, the relative `output_error` on them;
            None for a weight whose inputs have no Gram matrix.
        dropped: names of tensors that the format cannot hold and that were left out because that was asked
            for.
    """

    format: str
    path: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    method: str = ""

    @property
    def exact(self) -> bool:
        """Whether every weight is written exactly."""
        return all(row["exact"] for row in self.rows)

    @property
    def largest_error(self) -> float:
        """The largest relative error of a weight's change."""
        return max((row["error"] for row in self.rows), default=0.0)

    @property
    def largest_output_error(self) -> float | None:
        """The largest relative error of a weight's outputs on the data, or None without data."""
        known = [row["output_error"] for row in self.rows if row.get("output_error") is not None]
        return max(known, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "format": self.format,
            "path": self.path,
            "method": self.method,
            "rows": self.rows,
            "dropped": self.dropped,
        }

    def __str__(self) -> str:
        """Return a table, or one line where all is exact."""
        form = f"{self.format} ({self.method})" if self.method else self.format
        head = f"{form}: {len(self.rows)} weights written to {self.path}"
        tail = [f"left out: {', '.join(self.dropped)}"] if self.dropped else []
        if self.exact:
            return "\n".join([f"{head}, all exact", *tail])
        lines = [f"  {row['weight']}: rank {row['rank']}, {_quality(row)}" for row in self.rows]
        return "\n".join([f"{head}, largest relative error {self.largest_error:.3g}", *lines, *tail])


def _quality(row: Mapping[str, Any]) -> str:
    if row["exact"]:
        return "exact"
    outputs = row.get("output_error")
    further = "" if outputs is None else f", of outputs {outputs:.3g}"
    return f"relative error {row['error']:.3g}{further}"
