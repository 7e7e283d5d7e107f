"""What a merge did, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        method: name in the catalogue.
        options: of the method, with its defaults.
        models: what was merged, as a sentence calls it.
        base: likewise, or "".
        weights: of each model.
        seed: of every random choice.
        dtype: of the result; with "+" between several.
        inputs: types in which the models are stored, likewise; rules compute in float32, or float64 where a
            tensor is stored so.
        rows: per tensor its name `tensor` and `change`, the norm of what the merge changed in the base (the
            first model where there is none) over the norm of the base's; of adapters, per weight its path
            `tensor`, the `rank` written, whether it is `exact`, and the relative Frobenius `error`.
        taken: tensors that are not merged, such as integers, and came as they are.
        notes: sentences on what a reader might not expect.
        seconds: it took.
        bytes: of the tensors written or returned.
        path: what was written, or "".
    """

    method: str
    options: dict[str, Any]
    models: list[str]
    base: str
    weights: list[float]
    seed: int
    dtype: str = ""
    inputs: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0
    path: str = ""

    @property
    def largest_error(self) -> float:
        """The largest relative error of a weight's change; 0 for models, which are merged exactly."""
        return max((row.get("error", 0.0) for row in self.rows), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**vars(self), "options": _plain(self.options)}

    def __str__(self) -> str:
        """Return some lines: what was merged how, and where the most changed."""
        head = f"{self.method}: {len(self.models)} merged, {len(self.rows)} tensors, {self._size()}"
        lines = [f"{head}, {self.seconds:.1f} s", f"  {self._types()}", *map(self._line, self._farthest())]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join([*lines, *([f"  written to {self.path}"] if self.path else [])])

    def _types(self) -> str:
        given = ", ".join(f"{key} {value}" for key, value in self.options.items())
        stored = f"; the models are stored in {self.inputs}" if self.inputs != self.dtype else ""
        return f"weights {', '.join(f'{weight:g}' for weight in self.weights)}; {given}; {self.dtype}{stored}"

    def _farthest(self, count: int = 3) -> list[dict[str, Any]]:
        return sorted(self.rows, key=lambda row: -float(row.get("error", row.get("change", 0.0))))[:count]

    def _line(self, row: dict[str, Any]) -> str:
        if "rank" in row:
            quality = "exact" if row["exact"] else f"relative error {row['error']:.3g}"
            return f"  {row['tensor']}: rank {row['rank']}, {quality}"
        return f"  {row['tensor']}: changed by {row['change']:.3g} of its norm"

    def _size(self) -> str:
        size, units = float(self.bytes), iter(("bytes", "kB", "MB", "GB", "TB"))
        unit = next(units)
        while size >= 1000 and unit != "TB":
            size, unit = size / 1000, next(units)
        return f"{size:.3g} {unit}"


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it; what it cannot hold becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
