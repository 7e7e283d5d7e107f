"""Write docs/methods.md from what every method says of itself; `--check` says whether it is up to date."""

import sys
from pathlib import Path
from typing import Any

import rankfold as rf

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
HEAD = """# The methods

Written by `make docs` from what every method says of itself; do not edit it.
Any structure goes with any initialiser that gives a start which it accepts; `rf.adapt` refuses the rest with
a sentence. Options of a structure are keyword arguments of `rf.adapt`, and `--set structure.option=value` on
the command line.
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


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text
        print(f"{PAGE.name} is out of date: run make docs" if stale else f"{PAGE.name} is up to date")
        return int(stale)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
