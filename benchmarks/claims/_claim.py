"""The form in which a claim of a paper is checked: what was claimed, at what scale, what was found."""

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def interval(values: Sequence[float]) -> Interval:
    """Return mean and 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = _T.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Claim:
    """What was claimed and what was found.

    Attributes:
        paper: title, year.
        claim: as it is tested here, in one sentence.
        scale: model, data, steps, seeds.
        result: what was measured, by name.
        interval: of the quantity that decides.
        verdict: agrees, disagrees, or undecided (the interval holds zero).
        command: that repeats it.
    """

    paper: str
    claim: str
    scale: str
    result: dict[str, Any]
    interval: Interval
    verdict: str
    command: str

    def write(self, name: str) -> Path:
        """Write the claim to `results/<name>.json`, complete or not at all."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return path


def below_zero(found: Interval) -> str:
    """Return the verdict on a claim that a difference is negative."""
    return "agrees" if found.high < 0 else "disagrees" if found.low > 0 else "undecided"


class Runs:
    """Runs that are done once: each result is kept in a file, so that a check goes on where it stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def once(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a run, from its file if it is done."""
        path = self.folder / f"{key}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
        result = run()
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(path)
        return result
