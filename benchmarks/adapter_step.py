"""One training step of adapted models against the frozen model, beside peft's.

python benchmarks/adapter_step.py [--methods lora,dora] [--rounds 7] [--json FILE] [--quick]
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _counts import bound
from _llama import QUICK, Size, batch_of, build, copy_of, loss_of, ours, theirs, training_step
from _measure import Step, paired_ratios, peak_megabytes, print_header, saved_megabytes
from torch import nn


@dataclass(frozen=True)
class Case:
    """A method at a rank, with options."""

    method: str
    rank: int
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = "".join(f" {key}={value}" for key, value in self.options)
        return f"{self.method} r={self.rank}{options}"


@dataclass
class Row:
    """What was measured of one library's method."""

    library: str
    case: str
    time: float
    bound: float
    saved: float
    peak: float | None
    trained: int


CASES = [
    Case("lora", 16),
    Case("lora", 16, (("dropout", 0.1),)),
    Case("dora", 16),
    Case("hira", 16),
    Case("gralora", 16),
    Case("vera", 16),
    Case("vera", 256),
    Case("hra", 8),
]
COLUMNS = ("time/floor", "bound", "time/bound", "saved MB", "peak MB", "trained")


def models_of(base: nn.Module, cases: list[Case], libraries: list[str]) -> dict[tuple[str, Case], nn.Module]:
    makers = {"rankfold": ours, "peft": theirs}
    return {
        (library, case): makers[library](base, case.method, case.rank, **dict(case.options))
        for case in cases
        for library in libraries
    }


def measure(size: Size, cases: list[Case], libraries: list[str], rounds: int) -> list[Row]:
    base, batch = build(size), batch_of(size)
    plain = copy_of(base).train()
    models = models_of(base, cases, libraries)
    steps: dict[str, Step] = {
        f"{library} {case}": training_step(model, batch) for (library, case), model in models.items()
    }
    floor = training_step(plain, batch)
    ratios = paired_ratios(floor, steps, rounds)
    rows = [Row("", "floor", 1.0, 1.0, _saved(plain, batch), peak_megabytes(floor), 0)]
    for (library, case), model in models.items():
        key = f"{library} {case}"
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        limit = bound(case.method, case.rank, size)
        saved = _saved(model, batch)
        rows.append(Row(library, str(case), ratios[key], limit, saved, peak_megabytes(steps[key]), trained))
    return rows


def _saved(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    return saved_megabytes(lambda: loss_of(model, batch), [*model.parameters(), *model.buffers(), *batch])


def line(row: Row) -> str:
    peak = "-" if row.peak is None else f"{row.peak:.0f}"
    cells = (f"{row.time:.2f}", f"{row.bound:.2f}", f"{row.time / row.bound:.2f}", f"{row.saved:.0f}", peak)
    return f"{row.case:22} {row.library:9}" + "".join(f"{c:>12}" for c in (*cells, f"{row.trained:,}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", help="comma-separated; all by default")
    parser.add_argument("--libraries", default="rankfold,peft")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, once, to see that everything runs"
    )
    arguments = parser.parse_args()
    size, rounds = (QUICK, 1) if arguments.quick else (Size(), arguments.rounds)
    wanted = arguments.methods.split(",") if arguments.methods else [case.method for case in CASES]
    cases = [case for case in CASES if case.method in wanted]
    if not cases:
        parser.error(f"--methods: choose from {', '.join(dict.fromkeys(c.method for c in CASES))}")
    if arguments.quick:
        cases = [Case(c.method, min(c.rank, 32), c.options) for c in cases]
    print_header(
        "Training step of an adapted model over that of the frozen model",
        f"{size}, all {7 * size.layers} linear layers adapted.",
        "A step is forward and backward; the floor forms gradients to the embedded inputs only.",
        f"time/floor: process CPU time over that of a floor step beside it, median of {rounds}.",
        "bound: (floor + the method's own multiply-adds at the cheapest order) / floor, counted.",
        "saved: kept by autograd for backward, parameters left out. peak: rise of resident memory.",
    )
    print(f"{'method':32}" + "".join(f"{c:>12}" for c in COLUMNS))
    rows = measure(size, cases, arguments.libraries.split(","), rounds)
    print("\n".join(map(line, rows)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
