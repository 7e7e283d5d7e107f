"""A picture of what was cut: the spectrum of every weight, and where the cut is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rankfold.compression.report import Row

MOST_COLUMNS = 14
LONGEST = 28  # letters of a title
DECADES = 4  # of singular values; less than the smallest is drawn as that
STEP = (1.14, 1.5)  # from panel to panel, in widths and heights of one

Line = list[tuple[float, float]]


def draw_spectra(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw singular values on a logarithmic scale, one small panel a weight, with the chosen rank marked.

    All panels are lines of one plot: hundreds of plots would take minutes.

    Args:
        rows: the weights; those without a spectrum are left out.
        title: over the picture.
        path: of the .png file.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.spectrum]
    columns = min(MOST_COLUMNS, max(3, math.ceil(math.sqrt(len(shown)))))
    corners = [(STEP[0] * (i % columns), -STEP[1] * (i // columns)) for i in range(len(shown))]
    lines = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(1.5 * columns + 0.4, 1.35 * lines + 0.9))
    axes = figure.add_axes((0.01, 0.01, 0.98, 1 - 0.7 / (1.35 * lines + 0.9)))
    axes.add_collection(
        LineCollection([line for c in corners for line in _frame(c)], colors="0.8", linewidths=0.5)
    )
    curves = [_curve(row, corner) for row, corner in zip(shown, corners, strict=True)]
    axes.add_collection(LineCollection(curves, colors="tab:blue", linewidths=1.0, label="spectra"))
    cuts = [_cut(row, corner) for row, corner in zip(shown, corners, strict=True) if row.rank is not None]
    axes.add_collection(LineCollection(cuts, colors="tab:red", linewidths=1.0, label="cuts"))
    for row, name, (x, y) in zip(shown, short_names([row.weight for row in shown]), corners, strict=True):
        axes.text(x + 0.5, y + 1.03, f"{name}\n{_said(row)}", ha="center", va="bottom", fontsize=5)
    axes.set(xlim=(-0.07, STEP[0] * columns), ylim=(-STEP[1] * (lines - 1) - 0.1, 1.4))
    axes.set_axis_off()
    figure.suptitle(f"{title}\n{LEGEND}", fontsize=7)
    figure.savefig(path, dpi=130)


LEGEND = (
    f"singular values, relative to the largest, over {DECADES} powers of ten; red: the rank that was kept"
)


def _said(row: Row) -> str:
    return "as it was" if row.rank is None else f"rank {row.rank} of {min(row.shape)}"


def _frame(corner: tuple[float, float]) -> list[Line]:
    """Return the lines of a panel: one for each power of ten, and its two sides."""
    x, y = corner
    levels = [y + level / DECADES for level in range(DECADES + 1)]
    sides: list[Line] = [[(x, y), (x, y + 1)], [(x + 1, y), (x + 1, y + 1)]]
    return [*sides, *([(x, level), (x + 1, level)] for level in levels)]


def _curve(row: Row, corner: tuple[float, float]) -> Line:
    most = min(row.shape)
    points = ((1 + row.spacing * number, value) for number, value in enumerate(row.spectrum))
    return [(corner[0] + place / most, corner[1] + _height(value)) for place, value in points]


def _height(value: float) -> float:
    """Return where a singular value, relative to the largest, stands in a panel of height 1."""
    return 1 + math.log10(max(value, 10.0**-DECADES)) / DECADES


def _cut(row: Row, corner: tuple[float, float]) -> Line:
    assert row.rank is not None
    x = corner[0] + row.rank / min(row.shape)
    return [(x, corner[1]), (x, corner[1] + 1)]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return paths without the parts that all of them begin with, the end of those that are long.

    Example:
        >>> short_names(["model.layers.0.mlp", "model.layers.1.attention"])
        ['0.mlp', '1.attention']
    """
    parts = [path.split(".") for path in paths]
    common = 0
    while parts and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    names = [".".join(p[common:]) for p in parts]
    return [name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}" for name in names]
