"""Every page that is written by hand says what runs: its Python is executed from top to bottom.

What a comment `# -> text` promises is printed.
"""

import re
import runpy
from pathlib import Path

import pytest

from rankfold import catalogue

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "```python" in page.read_text(encoding="utf-8")]


def code_of(text: str) -> str:
    """Return the Python of a page, every line where it stands in the page."""
    lines, inside = [], False
    for line in text.splitlines():
        is_code = inside and line != "```"
        lines.append(line if is_code else "")
        inside = is_code or line == "```python"
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    catalogue.load_all()
    monkeypatch.setattr(catalogue, "_METHODS", dict(catalogue._METHODS))  # pages register methods
    script = tmp_path / f"{page.stem}.py"
    script.write_text(code_of(page.read_text(encoding="utf-8")), encoding="utf-8")
    runpy.run_path(str(script))
    printed = capsys.readouterr().out
    for promised in re.findall(r"# -> (.*)", script.read_text(encoding="utf-8")):
        assert promised in printed


def test_the_guide_has_its_pages_and_the_start():
    jobs = {"adapt", "pretrain", "compress", "merge"}
    assert {page.stem for page in PAGES} == {"index", "combine", "serve", "extend", *jobs}
