"""One training step of adapted models against the frozen model, beside peft's and LyCORIS's.

python benchmarks/adapter_step.py [--only lora,dora] [--rounds 7] [--small | --quick] [--table]

Every structure of the catalogue that changes linear weights by a matrix is a row. A row is written to the
results as soon as it is measured, and what is there is not measured again; `--fresh` measures it again.
`--table` only prints what is there, for README.md. LyCORIS is measured where it can be imported:
pip install --no-deps --target DIR lycoris-lora einops, and DIR in PYTHONPATH.
"""

import argparse
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _counts import bound
from _llama import QUICK, SMALL, Size, batch_of, build, copy_of, loss_of, ours, training_step
from _measure import Step, paired_ratios, print_header, saved_megabytes
from _peers import PEERS
from torch import nn

import rankfold as rf
from rankfold.layers import require

RESULTS = Path(__file__).parent / "results"
# Elsewhere the method's own default; peft's form of bone asks for a divisor of all sides.
RANKS = {"lora": 16, "dora": 16, "hira": 16, "gralora": 16, "bone": 32}


@dataclass(frozen=True)
class Case:
    """A method at a rank, with options; a rank of None where it has none."""

    method: str
    rank: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "".join(f" {key}={value}" for key, value in self.options.items())
        return self.method + (f" r={self.rank}" if self.rank else "") + options


@dataclass
class Measured:
    """What was measured of one library's method: its step over the floor's, bytes kept, numbers trained."""

    time: float
    saved: float
    trained: int


@dataclass
class Row:
    """One line of the table.

    Attributes:
        case: what was measured.
        bound: what counted multiply-adds at the cheapest order make of `time`.
        floor_saved: megabytes that the frozen model keeps for backward.
        libraries: rankfold and its peers.
        refused: libraries that have the method but cannot hold this model, and why.
    """

    case: str
    bound: float = 1.0
    floor_saved: float = 0.0
    libraries: dict[str, Measured] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    """Yield every structure at its default rank, then a few variants."""
    for method in rf.methods("structure"):
        traits = method.traits
        if "linear" in traits["layers"] and traits["gate"] is None and not traits["activations"]:
            yield Case(method.name, RANKS.get(method.name, traits["rank"]), dict(traits["example"]))
    yield Case("lora", 16, {"dropout": 0.1})
    yield Case("vera", 16)


class Bench:
    """The frozen model and a batch, against which every case is measured.

    Args:
        size: of the model.
        rounds: how often every step is timed.
    """

    def __init__(self, size: Size, rounds: int) -> None:
        self.size, self.rounds = size, rounds
        self.base, self.batch = build(size), batch_of(size)
        self.plain = copy_of(self.base).train()
        self.floor_saved = self._saved(self.plain)

    def row(self, case: Case) -> Row:
        """Measure one case and its peers, step by step in turn with the floor."""
        row, models = Row(str(case), floor_saved=self.floor_saved), {}
        for library, make in {"rankfold": ours, **PEERS}.items():
            try:
                models[library] = make(self.base, case.method, case.rank, case.options)
            except KeyError:
                continue
            except (ValueError, rf.errors.RankfoldError) as refusal:
                row.refused[library] = str(refusal)
        if "rankfold" not in models:
            return row
        row.bound = bound(case.method, case.rank, self.size, self._first_layer(models["rankfold"]))
        steps: dict[str, Step] = {
            library: training_step(model, self.batch) for library, model in models.items()
        }
        times = paired_ratios(training_step(self.plain, self.batch), steps, self.rounds)
        for library, model in models.items():
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            row.libraries[library] = Measured(times[library], self._saved(model), trained)
        return row

    def _saved(self, model: nn.Module) -> float:
        excluded = [*model.parameters(), *model.buffers(), *self.batch]
        return saved_megabytes(lambda: loss_of(model, self.batch), excluded)

    @staticmethod
    def _first_layer(model: nn.Module) -> list[rf.weights.Weight]:
        expressions = require(model).expressions("default")
        return [weight for path, weight in expressions.items() if ".layers.0." in path]


COLUMNS = (
    "structure",
    "time / floor",
    "bound",
    "over bound",
    "saved / floor",
    "trained",
    "peer",
    "its time / floor",
    "ours / its",
    "its saved / floor",
)


def cells(row: Row) -> list[str]:
    """Return a line of the table; the fastest peer stands in it."""
    if "rankfold" not in row.libraries:
        return [row.case, *["-"] * (len(COLUMNS) - 1)]
    own = row.libraries["rankfold"]
    peers = [name for name in row.libraries if name != "rankfold"]
    numbers = [own.time, row.bound, own.time / row.bound, own.saved / row.floor_saved]
    line = [row.case, *(f"{n:.2f}" for n in numbers), f"{own.trained:,}"]
    if not peers:
        return [*line, *["-"] * 4]
    name = min(peers, key=lambda each: row.libraries[each].time)
    peer = row.libraries[name]
    return [
        *line, name, f"{peer.time:.2f}", f"{own.time / peer.time:.2f}", f"{peer.saved / row.floor_saved:.2f}",
    ]  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def stored(path: Path) -> Row | None:
    """Return a row that was measured before."""
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    libraries = {name: Measured(**values) for name, values in data.pop("libraries").items()}
    return Row(**data, libraries=libraries)


def store(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(row), indent=1), encoding="utf-8")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="methods, comma-separated; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--small", action="store_true", help="two layers and a small vocabulary")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, once, to see that everything runs"
    )
    arguments = parser.parse_args()
    kind = "quick" if arguments.quick else "small" if arguments.small else "full"
    size = {"quick": QUICK, "small": SMALL, "full": Size()}[kind]
    wanted = arguments.only.split(",") if arguments.only else None
    chosen = [case for case in cases() if wanted is None or case.method in wanted]
    if not chosen:
        parser.error(f"--only: choose from {', '.join(dict.fromkeys(c.method for c in cases()))}")
    paths = {case: arguments.results / f"adapter_step-{kind}" / f"{case}.json" for case in map(str, chosen)}
    if arguments.table:
        print(table([row for path in paths.values() if (row := stored(path)) is not None]))
        return
    print_header(
        "Training step of an adapted model over that of the frozen model",
        f"{size}, all {7 * size.layers} linear layers adapted.",
        "A step is forward and backward; the floor forms gradients to the embedded inputs only.",
        f"time: process CPU time over that of a floor step beside it, median of {arguments.rounds}.",
        "bound: (floor + the method's own multiply-adds at the cheapest order) / floor, counted.",
        "saved: bytes kept by autograd for backward, parameters and buffers left out.",
    )
    torch.manual_seed(0)
    bench = Bench(size, 1 if arguments.quick else arguments.rounds)
    print(f"| {' | '.join(COLUMNS)} |")
    for case in chosen:
        path = paths[str(case)]
        row = None if arguments.fresh or arguments.quick else stored(path)
        if row is None:
            row = bench.row(case)
            store(path, row)
            gc.collect()
        print(f"| {' | '.join(cells(row))} | {row.refused or ''}", flush=True)


if __name__ == "__main__":
    main()
