"""The documentation site is built without a warning, and every method has a page whose example runs."""

import doctest
import inspect
import os
import re
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import composition_pages
import method_examples
import method_pages
import pytest
import reference_pages

import rankfold as rf
from rankfold import catalogue
from rankfold.methods import registry, space
from rankfold.methods.registry import structure

ROOT = Path(__file__).parent.parent.parent


@cache
def page_of(axis, name):
    return method_pages.page(registry.get(axis, name))


@pytest.mark.parametrize("method", rf.methods(), ids=lambda m: f"{m.axis}={m.name}")
def test_a_method_has_a_page_whose_example_runs(method):
    shown = re.search(r"^```pycon\n(.*?)^```$", page_of(method.axis, method.name), re.MULTILINE | re.DOTALL)
    example = doctest.DocTestParser().get_doctest(shown[1], {}, method.name, None, None)
    statements = [e for e in example.examples if "import" not in e.source]
    assert 1 <= len(statements) <= 4
    failures: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rank that such a small model cannot hold is capped
        doctest.DocTestRunner(verbose=False).run(example, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("method", rf.methods(), ids=lambda m: f"{m.axis}={m.name}")
def test_a_page_says_what_the_method_says_of_itself(method):
    page = page_of(method.axis, method.name)
    said = [
        method.formula,
        method_pages.escaped(method.title),
        str(method.start),
        f"year = {{{method.year}}}",
    ]
    said += [f"| `{option}` |" for option in method.options]
    said += [f"https://arxiv.org/abs/{method.arxiv}"] if method.arxiv else []
    said += [f"https://github.com/{method.code}"] if method.code else []
    assert [text for text in said if text not in page and method_pages.escaped(text) not in page] == []


def test_every_option_has_a_meaning():
    lacking = [
        f"{method.axis} {method.name}: {option}"
        for method in rf.methods()
        for option in method.options
        if option not in method_pages.described(method)
        and not re.search(rf"\b{option}\b", (inspect.getdoc(method.build) or "").partition("\n")[0])
    ]
    assert lacking == []


def test_every_page_is_in_the_navigation_once():
    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            leaf for each in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(each)
        ]

    listed = leaves(method_pages.navigation())
    assert sorted(listed) == sorted(["methods/index.md", *map(method_pages.address, rf.methods())])
    index = method_pages.index()
    assert all(f"({address.removeprefix('methods/')})" in index for address in listed[1:])


def test_costs_are_counted():
    lora = method_pages.costs(rf.find_method("lora"))["linear"]
    assert (lora.trained, lora.stored) == (2 * 8 * 1024, 2 * 8 * 1024)
    assert lora.macs == 1024 * 1024 + 2 * 8 * 1024
    assert "| 16,384 |" in method_pages.page(rf.find_method("lora"))


def test_a_page_has_exactly_the_partners_that_are_accepted():
    page = method_pages.page(rf.find_method("hra"))
    for other in rf.methods("ranks") + rf.methods("dynamics") + rf.methods("init"):
        accepted = space.judge(rf.find_method("hra"), other).accepted
        assert (f"](../{other.axis}/{method_pages.slug(other)}.md)" in page) == accepted, other.name


def test_the_tables_have_every_pair_once():
    tables = composition_pages.pages()
    marked = sum(line.count("| x ") for page in tables.values() for line in page.splitlines())
    assert marked == sum(verdict.accepted for verdict in space.pairs())


def test_the_reference_has_every_public_name():
    pages = reference_pages.pages()
    for module, page in ((rf, "reference/index.md"), (rf.weights, "reference/weights.md")):
        for name in module.__all__:
            value = getattr(module, name)
            if hasattr(value, "__qualname__"):
                assert f"::: {value.__module__}.{value.__qualname__}\n" in pages[page], name


def test_a_method_that_cannot_be_exampled_is_named(monkeypatch):
    monkeypatch.setattr(catalogue, "_METHODS", dict(catalogue._METHODS))

    @structure("demanding", title="None", year=2024, formula="W = W0")
    def demanding(site, rank, *, regions: tuple[int, ...] = ()):
        raise ValueError("it needs regions")

    with pytest.raises(method_examples.NoExample, match=r"'demanding'.*it needs regions.*`example=`"):
        method_pages.page(rf.find_method("demanding"))


def test_a_method_is_exampled_with_what_its_registration_gives(monkeypatch):
    monkeypatch.setattr(catalogue, "_METHODS", dict(catalogue._METHODS))

    @structure("demanding", title="None", year=2024, formula="W = W0", example={"regions": (1, 2)})
    def demanding(site, rank, *, regions: tuple[int, ...] = ()):
        assert regions
        return site.base + site.frozen(site.matrix(), "copy")

    assert "rank=2, regions=(1, 2))" in method_examples.example(rf.find_method("demanding"))


def test_the_paragraph_that_says_when_to_use_a_method_stands_under_that_title():
    doc = method_pages.Docstring.parse("Name: a sentence.\n\n    W = W0\n\nUse it where\nit fits.\n\nMore.")
    assert doc == method_pages.Docstring(
        "Name: a sentence.", "Use it where it fits.", ("    W = W0", "More.")
    )


def test_plain_text_is_shown_as_it_is():
    import markdown

    text = "a*b*c, W_ij _v_ [x](y) <b> #1 |z| \\n 2. `code_*`"
    shown = markdown.markdown(method_pages.escaped(text))
    assert shown == "<p>a*b*c, W_ij _v_ [x](y) &lt;b&gt; #1 |z| \\n 2. <code>code_*</code></p>"


def test_the_site_is_built_without_a_warning(tmp_path):
    site = tmp_path / "site"
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [line for line in (result.stdout + result.stderr).splitlines() if not line.startswith("INFO ")]
    assert said == []
    for method in rf.methods():
        assert (site / method_pages.address(method).replace(".md", ".html")).is_file()
    asked = re.findall(
        r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//[^"]*',
        (site / "index.html").read_text("utf-8"),
    )
    assert not asked, "the site asks another host for something"


def test_nothing_that_is_generated_stands_in_the_repository():
    assert not [name for name in ("methods", "reference") if (ROOT / "docs" / name).exists()]
    assert [page.name for page in (ROOT / "docs").glob("composition*")] == ["composition.md"]
