"""A table for every two axes: which of their methods go together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from method_pages import AXES, slug, table

import rankfold as rf
from rankfold.methods import space


def pages() -> dict[str, str]:
    """Return every table by its path under docs/."""
    verdicts = list(space.pairs())
    found = {}
    for one, other in itertools.combinations(space.AXES, 2):
        mine = [v for v in verdicts if (space.axis_of(v.first), space.axis_of(v.second)) == (one, other)]
        found[f"composition/{one}-{other}.md"] = _page(one, other, mine)
    return found


def navigation() -> list[dict[str, str]]:
    """Return the tables as entries of the site's navigation."""
    return [
        {f"{one} x {other}": f"composition/{one}-{other}.md"}
        for one, other in itertools.combinations(space.AXES, 2)
    ]


def _page(one: str, other: str, verdicts: Sequence[space.Verdict]) -> str:
    taken = sum(verdict.accepted for verdict in verdicts)
    return (
        f"# {AXES[one][0]} with {AXES[other][0].lower()}\n\n"
        f"{taken} of {len(verdicts)} pairs go together (x); `rf.adapt` refuses the others. Why, is on the "
        f"page of either method and in `rankfold methods NAME --compose`.\n\n{_matrix(verdicts)}"
    )


def _matrix(verdicts: Sequence[space.Verdict]) -> str:
    columns = list({verdict.second.name: verdict.second for verdict in verdicts}.values())
    rows: dict[str, list[str]] = {}
    for verdict in verdicts:
        rows.setdefault(_link(verdict.first), []).append("x" if verdict.accepted else "")
    return table(["", *map(_link, columns)], ([name, *cells] for name, cells in rows.items()))


def _link(method: rf.Method) -> str:
    return f"[{method.name}](../methods/{method.axis}/{slug(method)}.md)"
