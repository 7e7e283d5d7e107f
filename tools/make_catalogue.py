"""Write docs/methods.md and docs/composition.md from the catalogue; `--check` says whether both are fresh."""

import itertools
import sys
from pathlib import Path
from typing import Any

import rankfold as rf
from rankfold.methods import space

DOCS = Path(__file__).parent.parent / "docs"
HEAD = """# The methods

Written by `make docs` from what every method says of itself; do not edit it.
What goes with what is in [composition.md](composition.md). Options of a structure are keyword arguments of
`rf.adapt`; options of any part are given by `rf.Recipe(init=("lora-ga", {"gamma": 64}))`, and by
`--set init.gamma=64` on the command line.
"""
SPACE = """# What goes with what

Written by `make docs` from what every method says of itself; do not edit it. A point of the space is
`structure/init/ranks/dynamics`, such as `dora/pissa/adalora/lora+`. Below, for every two axes, which methods
go together, and the sentence with which `rf.adapt` refuses the others; the tests run every accepted pair from
its start to its end. `rankfold methods --compose` prints the same.
"""


def page() -> str:
    found = rf.methods()
    axes = list(dict.fromkeys(method.axis for method in found))
    parts = [HEAD]
    for axis in axes:
        mine = [method for method in found if method.axis == axis]
        parts.append(f"## {axis}\n\n{_table(mine)}")
        parts += [_section(method) for method in mine]
    return "\n".join(parts)


def _table(found: list[rf.Method]) -> str:
    rows = [f"| [{m.name}](#{m.name}) | {m.year} | `{_cell(m.formula)}` | {m.status} |" for m in found]
    return "\n".join(["| name | year | formula | status |", "|---|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _section(method: rf.Method) -> str:
    links = [f"[arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv})"] if method.arxiv else []
    links += [f"[{method.code}](https://github.com/{method.code})"] if method.code else []
    lines = [
        f"### {method.name}\n",
        f"{method.title} ({method.year}). {' · '.join(links)}\n",
        "```text",
        method.doc.strip(),
        "```\n",
        f"- Before the first step: {method.start}.",
        *[f"- Accepts a start that is {' or '.join(starts)}." for starts in _given(method, "starts")],
        *[f"- Default rank: {rank}." for rank in _given(method, "rank")],
        *[f"- `{name}` = `{value!r}`" for name, value in method.options.items()],
    ]
    return "\n".join([*lines, ""])


def _given(method: rf.Method, trait: str) -> list[Any]:
    value = method.traits.get(trait)
    return [value] if value else []


def composition() -> str:
    verdicts = list(space.pairs())
    parts = [SPACE]
    for one, other in itertools.combinations(space.AXES, 2):
        mine = [v for v in verdicts if (v.first.axis, v.second.axis) == (one, other)]
        parts.append(f"## {one} x {other}\n\n{_matrix(mine)}\n")
        parts += [f"- `{v.recipe.text()}`: {v.reason}." for v in mine if not v.accepted]
        parts.append("")
    return "\n".join(parts)


def _matrix(verdicts: list[space.Verdict]) -> str:
    columns = list(dict.fromkeys(v.second.name for v in verdicts))
    rows: dict[str, list[str]] = {}
    for verdict in verdicts:
        rows.setdefault(verdict.first.name, []).append("yes" if verdict.accepted else "")
    head = f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    return "\n".join([head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def main() -> int:
    stale = [name for name, text in PAGES.items() if not _is(DOCS / name, text())]
    if "--check" in sys.argv[1:]:
        print(f"{', '.join(stale)} out of date: run make docs" if stale else f"{', '.join(PAGES)} up to date")
        return int(bool(stale))
    DOCS.mkdir(exist_ok=True)
    for name, text in PAGES.items():
        (DOCS / name).write_text(text(), encoding="utf-8")
        print(f"wrote {DOCS / name}")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


PAGES = {"methods.md": page, "composition.md": composition}


if __name__ == "__main__":
    sys.exit(main())
