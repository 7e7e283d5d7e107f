"""The demo's report: one HTML page that needs no other file, with a table and two pictures."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 15
"""Steps that the drawn loss is the mean of."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn: its colour on a light and on a dark page, its marker and its dashes."""

    light: str
    dark: str
    marker: str
    dashes: str | tuple[int, tuple[int, ...]]


LOOKS = (
    Look("#5f6b7a", "#a3adba", "s", ":"),
    Look("#a8480a", "#f5a55c", "D", "-"),
    Look("#1f5fd6", "#79adff", "o", "-"),
    Look("#7b34c9", "#c79bff", "^", "--"),
    Look("#08794f", "#45d19b", "v", "-."),
    Look("#c01a6b", "#ff86bd", "P", (0, (5, 1, 1, 1, 1, 1))),
)
INK, FAINT, PAPER = Look("#1c2430", "#e6e9ee", "", ""), Look("#c9d0d9", "#3a4350", "", ""), "#ffffff"


@dataclass(frozen=True)
class Row:
    """What the table says of a method.

    Args:
        name: the method.
        rank: of its change; None where it has none.
        rate: the learning rate that the sweep picked.
        right: test examples whose most probable class is right.
        count: test examples.
        trained: numbers that were trained.
        seconds: processor time of the training steps.
        peak_bytes: largest memory of the process that trained.
        start_bytes: its memory before the first step.
        losses: training loss of each step.
    """

    name: str
    rank: int | None
    rate: float
    right: int
    count: int
    trained: int
    seconds: float
    peak_bytes: int
    start_bytes: int
    losses: Sequence[float]

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.count)

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `COLUMNS`."""
        low, high = self.interval
        return (
            self.name if self.rank is None else f"{self.name}, rank {self.rank}",
            f"{100 * self.accuracy:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{self.trained:,}",
            f"{self.seconds:.0f} s",
            f"{self.peak_bytes / 2**20:,.0f} MiB",
            f"{self.rate:g}",
        )


COLUMNS = (
    "method",
    "accuracy",
    "95 % interval",
    "trained parameters",
    "time",
    "peak memory",
    "learning rate",
)
SWEEP_COLUMNS = ("method", "learning rate", "validation accuracy", "validation loss")


@dataclass(frozen=True)
class Prediction:
    """A test example beside what the reloaded model says of it."""

    text: str
    predicted: str
    true: str


@dataclass(frozen=True)
class Story:
    """Everything that the page tells.

    Args:
        rows: a row for each method, in the order in which they are shown.
        sweep: by method, the learning rates tried, each with its validation accuracy and loss.
        data: sentences that describe the data.
        protocol: sentences that say how it was measured.
        reload: a sentence on the adapter that was saved and loaded again.
        predictions: examples of its predictions.
        commands: what to type next.
    """

    rows: Sequence[Row]
    sweep: Mapping[str, Sequence[tuple[float, float, float]]]
    data: Sequence[str]
    protocol: Sequence[str]
    reload: str
    predictions: Sequence[Prediction]
    commands: Sequence[str]


def wilson_interval(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share: the true shares that `right` of `count` does not speak against.

        (p + z^2/2n  -+  z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    Raises:
        ValueError: there are no trials, or more successes than trials.

    >>> low, high = wilson_interval(50, 100)
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"{right} of {count} is no share; count must be positive and at least right")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / count
    middle = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = ((middle + sign * spread) / (1 + z**2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def smoothed(losses: Sequence[float], width: int = SMOOTHING) -> list[float]:
    """The mean of each loss and those before it, `width` at most.

    >>> smoothed([4.0, 2.0, 0.0], width=2)
    [4.0, 3.0, 1.0]
    """
    windows = (losses[max(0, end - width) : end] for end in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in windows]


def write_report(story: Story, folder: Path) -> Path:
    """Write `report.html`, and `accuracy.png` for pages that cannot hold it; return the first one's path."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    style: dict[Any, object] = {
        "font.size": 11,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": "rankfold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT.light,
        "axes.labelcolor": INK.light,
        "text.color": INK.light,
        "xtick.color": INK.light,
        "ytick.color": INK.light,
        "grid.color": FAINT.light,
        "grid.linewidth": 0.6,
    }
    with mpl.rc_context(style):
        accuracy, losses = accuracy_figure(story.rows), loss_figure(story.rows)
        picture = io.BytesIO()
        accuracy.savefig(picture, format="png", dpi=200, facecolor=PAPER, metadata={"Software": None})
        page = page_of(story, inline_svg(accuracy, "accuracy"), inline_svg(losses, "losses"))
    _write(folder / "accuracy.png", picture.getvalue())
    _write(folder / "report.html", page.encode())
    return folder / "report.html"


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def accuracy_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy on the test set, with its interval, against the numbers trained."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for row, look in zip(rows, LOOKS, strict=False):
        low, high = row.interval
        axes.plot([row.trained] * 2, [low, high], color=look.light, linewidth=2, alpha=0.55)
        axes.plot(row.trained, row.accuracy, look.marker, color=look.light, markersize=8)
    axes.set_xscale("log")
    smallest, largest = (pick(row.trained for row in rows) for pick in (min, max))
    axes.set_xlim(smallest / 5, largest * 4)
    axes.set_ylim(*_limits(rows))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))  # no halves, which would be rounded
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(axis="y")
    axes.set_xlabel("trained parameters (head included)")
    axes.set_title("Accuracy on the test set, 95 % intervals", loc="left", fontsize=12)
    _label_points(axes, rows)
    return figure


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The range of all intervals, with room for the names above and below them."""
    low, high = min(row.interval[0] for row in rows), max(row.interval[1] for row in rows)
    room = 0.14 * (high - low)
    return low - room, high + room


def _label_points(axes: Axes, rows: Sequence[Row]) -> None:
    """Name each point above its interval, or below it where the neighbour's name would be in the way."""
    taken: list[tuple[float, float]] = []
    bottom, top = axes.get_ylim()
    for row, look in sorted(zip(rows, LOOKS, strict=False), key=lambda pair: pair[0].trained):
        low, high = row.interval
        column = math.log10(row.trained)
        crowded = any(
            abs(column - other) < 0.75 and abs(high - height) < 0.15 * (top - bottom)
            for other, height in taken
        )
        taken.append((column, low if crowded else high))
        axes.annotate(
            row.name,
            (row.trained, low if crowded else high),
            xytext=(0, -5 if crowded else 5),
            textcoords="offset points",
            ha="center",
            va="top" if crowded else "bottom",
            color=look.light,
            fontweight="bold",
        )


def loss_figure(rows: Sequence[Row]) -> Figure:
    """Training loss over the steps, smoothed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for row, look in zip(rows, LOOKS, strict=False):
        curve = smoothed(row.losses)
        axes.plot(
            range(1, len(curve) + 1),
            curve,
            color=look.light,
            linestyle=look.dashes,
            linewidth=1.8,
            label=row.name,
        )
    axes.grid(axis="y")
    axes.set_xlabel("step")
    axes.set_title(f"Training loss, mean of the last {SMOOTHING} steps", loc="left", fontsize=12)
    axes.legend(frameon=False, loc="lower left", handlelength=3)
    return figure


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an svg element whose colours follow the page's and whose ids begin with `name`."""
    target = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2)
    for variable, look in _variables().items():
        svg = svg.replace(look.light, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}-caption"', 1)


def _variables() -> dict[str, Look]:
    return {"--ink": INK, "--faint": FAINT} | {f"--method-{place}": look for place, look in enumerate(LOOKS)}


def _style() -> str:
    light = "; ".join(f"{name}: {look.light}" for name, look in _variables().items())
    dark = "; ".join(f"{name}: {look.dark}" for name, look in _variables().items())
    return f"""
:root {{ color-scheme: light dark; --paper: {PAPER}; --quiet: #5a6675; --panel: #f4f6f8; {light} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14181e; --quiet: #a3adba; --panel: #1e242c; {dark} }}
}}
body {{ margin: 0 auto; padding: 1rem; max-width: 46rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word }}
h1 {{ font-size: 1.5rem; line-height: 1.25 }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }}
figure {{ margin: 1.5rem 0 }}
svg {{ display: block; width: 100%; max-width: 38rem; height: auto; margin: auto }}
svg text {{ font-family: system-ui, sans-serif !important }}
figcaption, .quiet {{ color: var(--quiet); font-size: .9rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }}
th, td {{ padding: .4rem .6rem; border-bottom: 1px solid var(--faint); text-align: right }}
td {{ white-space: nowrap }}
th {{ font-weight: 600; vertical-align: bottom }}
th:first-child, td:first-child {{ text-align: left }}
pre {{ background: var(--panel); padding: .8rem; border-radius: .4rem; white-space: pre-wrap }}
blockquote {{ margin: 1rem 0; padding: .2rem 1rem; border-left: 3px solid var(--faint) }}
"""


def page_of(story: Story, accuracy: str, losses: str) -> str:
    """The page, around two svg elements."""
    best = max(story.rows, key=lambda row: row.accuracy)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rankfold demo: one model, {len(story.rows)} ways to adapt it</title>
<style>{_style()}</style>
</head>
<body>
<h1>One pretrained model, {len(story.rows)} ways to adapt it</h1>
{_paragraphs(story.data)}
<div class="wide">{_table(COLUMNS, [row.cells() for row in story.rows])}</div>
<figure>{accuracy}<figcaption id="accuracy-caption">Share of {best.count:,} test texts whose sub-package is
predicted right, against the numbers that were trained, on a logarithmic axis. Two methods whose intervals
overlap much are not told apart by this test.</figcaption></figure>
<figure>{losses}<figcaption id="losses-caption">Cross-entropy on the training batches, in nats; every method
sees the same batches in the same order.</figcaption></figure>
<h2>How it was measured</h2>
{_paragraphs(story.protocol)}
<details><summary>The learning rates that were tried</summary>
<div class="wide">{_table(SWEEP_COLUMNS, _sweep_cells(story))}</div>
</details>
<h2>Saved, loaded again, asked</h2>
<p>{html.escape(story.reload)}</p>
{"".join(_quoted(prediction) for prediction in story.predictions)}
<h2>What to type next</h2>
<pre>{html.escape(chr(10).join(story.commands))}</pre>
</body>
</html>
"""


def _paragraphs(sentences: Sequence[str]) -> str:
    return "\n".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "\n".join(line(cells, "td") for cells in body)
    return f"<table><thead>{line(head, 'th')}</thead>\n<tbody>{rows}</tbody></table>"


def _sweep_cells(story: Story) -> list[tuple[str, ...]]:
    return [
        (name, f"{rate:g}", f"{100 * accuracy:.1f} %", f"{loss:.3f}")
        for name, tried in story.sweep.items()
        for rate, accuracy, loss in tried
    ]


def _quoted(prediction: Prediction) -> str:
    text, says, true = map(html.escape, (prediction.text, prediction.predicted, prediction.true))
    return f"<blockquote>{text}<br><span class='quiet'>predicted {says}, true {true}</span></blockquote>\n"
