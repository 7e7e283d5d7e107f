"""The documentation site is built without a warning, and every method has a page whose example runs."""

import doctest
import os
import re
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import composition_pages
import method_costs
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
        f"year = {{{method.year}}}",
    ]
    said += [] if method.axis in method_pages.JOBS else [str(method.start)]  # they begin no training
    said += [f"| `{option}` |" for option in method.options]
    said += [f"https://arxiv.org/abs/{method.arxiv}"] if method.arxiv else []
    said += [f"https://github.com/{method.code}"] if method.code else []
    assert [text for text in said if text not in page and method_pages.escaped(text) not in page] == []


def test_every_option_has_a_meaning_that_is_more_than_its_symbol():
    lacking = [
        f"{method.axis} {method.name}: {option}"
        for method in rf.methods()
        for meant in [{"rank": "where it says none", **method_pages.described(method)}]
        for option in ({"rank"} if method.traits.get("rank") else set()) | set(method.options)
        if len(meant.get(option, "").split()) < 2
    ]
    assert lacking == []


def test_a_rank_is_described_by_the_method_itself():
    assert "| `rank` | `int` | `128` | rho; (out + in) rho entries are trained. |" in page_of(
        "structure", "lift"
    )


@pytest.mark.parametrize("method", rf.methods(), ids=lambda m: f"{m.axis}={m.name}")
def test_no_section_of_a_page_is_empty(method):
    titles = re.split(r"^## (.*)$", page_of(method.axis, method.name), flags=re.MULTILINE)[1:]
    assert all(text.strip() for text in titles[1::2])


WORDS = {
    "alora": "Acts on some tokens only",
    "kind": "Differs from class to class",
    "lora-composer": "Acts on the points of a region only",
    "mixture": "Differs from token to token",
    "reft": "Acts on some tokens only",
    "remix": "Differs from prompt to prompt",
    "x-lora": "Differs from token to token",
}


@pytest.mark.parametrize("name", WORDS)
def test_a_page_says_how_a_gated_change_differs_over_the_input(name):
    page = page_of("structure", name)
    said = [words for words in set(WORDS.values()) if f"- {words}" in page]
    assert said == [WORDS[name]]


def test_a_refused_fold_is_said_once():
    refused = [m for m in rf.methods("structure") if "Cannot be folded" in page_of("structure", m.name)]
    lines = [re.search("- Cannot be folded.*", page_of("structure", m.name))[0] for m in refused]
    assert {m.name for m in refused} >= {"alora", "locas", "mixture"}
    assert all(line.lower().count("folded") == 1 for line in lines)


def test_a_method_on_some_modules_only_does_not_promise_all():
    assert "the outputs of the gated feed-forward blocks (`gated-mlp`), no others" in page_of(
        "structure", "locas"
    )
    assert "the outputs of any, by default of `blocks`" in page_of("structure", "reft")


def test_a_recipe_costs_nothing_in_layers_that_it_does_not_target():
    assert "Conv2d" not in page_of("recipe", "ecg-lora")
    assert "Conv2d" in page_of("structure", "lora")


SHOWN = {"kind": "rf.gate_inputs(", "lora-composer": "rf.gate_inputs(", "remix": "rf.remix_loss(",
         "mixture": "rf.auxiliary_loss("}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_shows_what_a_method_cannot_do_without(name):
    assert SHOWN[name] in method_examples.example(rf.find_method(name))


def test_the_promise_of_the_first_step_names_the_options_that_it_holds_with():
    assert "exactly the base's output with fresh experts" in page_of("structure", "x-lora")
    assert "within 0.05 of its largest entry with the default ramp" in page_of("structure", "singlora")


def test_the_state_of_an_optimizer_is_counted():
    side, rank = method_costs.SIDE, 128
    kept = method_costs.state_of(rf.find_method("galore"))
    assert 3 * rank * side <= kept < 3 * rank * side + 8  # a basis, two moments, and a few counters
    assert f"keeps {kept:,} numbers" in page_of("optim", "galore")


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
    assert "| the rank of every weight. |" in method_pages.options(rf.find_method("demanding"))


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
