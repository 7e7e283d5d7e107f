"""The demo: its data set keeps its promises, its numbers are right, its page stands alone."""

import doctest
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402 - the examples are programs, found once their folder is on the path
import docstrings  # noqa: E402
import processes  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402


@pytest.fixture(scope="module")
def data() -> docstrings.Docstrings:
    return docstrings.load()


def test_every_class_has_its_share_of_every_split(data):
    for name, examples in data.splits.items():
        expected = dict.fromkeys(range(len(docstrings.SUBPACKAGES)), docstrings.SPLIT_SIZES[name])
        assert Counter(example.label for example in examples) == expected
    assert len(data.test) >= 800


def test_every_class_has_300_examples_from_10_modules(data):
    everything = [example for examples in data.splits.values() for example in examples]
    for label in range(len(docstrings.SUBPACKAGES)):
        own = [example for example in everything if example.label == label]
        assert len(own) >= 300
        assert len({example.module for example in own}) >= 10


def test_a_module_belongs_to_one_split_and_to_the_class_that_contains_it(data):
    modules = [{example.module for example in examples} for examples in data.splits.values()]
    assert all(not one & other for one, other in combinations(modules, 2))
    for examples in data.splits.values():
        for example in examples:
            assert f"{example.module}.".startswith(f"{docstrings.SUBPACKAGES[example.label]}.")


def test_no_text_names_its_object_its_module_or_a_library(data):
    for examples in data.splits.values():
        for example in examples:
            left = example.text.replace(docstrings.MASK, " ").lower()
            identifiers, words = set(re.findall(r"\w+", left)), set(re.findall(r"[a-z0-9]+", left))
            own = {example.name.lower(), *example.module.lower().split(".")}
            assert not own & identifiers, example
            assert not {"torch", "transformers", "huggingface", "pandas", "sklearn", "matplotlib"} & words
            assert not docstrings.GIVEAWAYS & words


def test_no_two_texts_are_alike_to_the_model_in_any_splits(data):
    base = demo.model_folder()
    ids = [tuple(row) for split in data.splits for row in demo.encode(data, split, base).ids]
    prints = [docstrings.fingerprint(e.text) for examples in data.splits.values() for e in examples]
    assert len(set(ids)) == len(ids) == len(set(prints))


def test_the_model_reads_64_tokens_of_a_text_at_most(data):
    encoded = demo.encode(data, "test", demo.model_folder())
    assert max(map(len, encoded.ids)) == demo.LONGEST <= 64
    assert encoded.labels == [example.label for example in data.test]


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """Two sub-packages of six modules, each with two docstrings and a line that fails when it is imported."""
    monkeypatch.setattr(docstrings, "SUBPACKAGES", ("first.part", "second"))
    monkeypatch.setattr(docstrings, "SPLIT_SIZES", {"test": 2, "validation": 2, "train": 2})
    for package in ("first/part", "second"):
        folder = tmp_path / package
        folder.mkdir(parents=True)
        for module in "uvwxyz":
            write_module(folder / f"{module}.py", [f"Does {package[:2]}{module}{n}" for n in ("one", "two")])
    return tmp_path


def write_module(path: Path, starts: list[str]) -> None:
    """A module with a function for each of the docstrings' first words."""
    rest = "and nine more words that fill up the text somehow."
    functions = [
        f'    def work_{place}():\n        """{start} {rest}"""\n' for place, start in enumerate(starts)
    ]
    path.write_text("raise RuntimeError('imported')\nif True:\n    pass\n" + "\n".join(functions))


def test_libraries_are_read_and_not_imported(library):
    found = docstrings.load(library)
    assert [len(examples) for examples in found.splits.values()] == [4, 4, 4]


def test_a_seed_decides_the_data_set(library):
    assert docstrings.load(library) == docstrings.load(library)
    assert docstrings.load(library, seed=1) != docstrings.load(library)


def test_a_text_that_two_classes_share_is_in_neither(library):
    shared = "A docstring that both of the libraries begin with"
    for place in ("first/part/u.py", "second/u.py"):
        write_module(library / place, [shared])
    found = docstrings.load(library)
    assert not any(e.text.startswith("A docstring") for examples in found.splits.values() for e in examples)


def test_of_a_text_that_is_repeated_one_stays():
    copies = [docstrings.Example(f"A text of {n} words.", 0, f"package.{n}", "name") for n in range(3)]
    assert docstrings.drop_duplicates(copies) == copies[:1]


def test_a_library_that_is_missing_or_too_small_is_named(library):
    for module in "uvwx":
        write_module(library / "second" / f"{module}.py", [])
    with pytest.raises(FileNotFoundError, match="second: too few docstrings to fill the train split"):
        docstrings.load(library)
    (library / "second").rename(library / "third")
    with pytest.raises(FileNotFoundError, match="second: not found"):
        docstrings.load(library)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (7, 10), (495, 1000), (1, 1)])
def test_the_interval_is_scipys(right, count):
    from scipy.stats import binomtest

    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert report.wilson_interval(right, count) == pytest.approx((expected.low, expected.high))


def test_the_interval_is_newcombes():
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263.
    assert report.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_share_has_no_interval(right, count):
    with pytest.raises(ValueError, match=f"{right} of {count}"):
        report.wilson_interval(right, count)


def test_a_pass_over_the_data_takes_every_example_once():
    examples = runs.Encoded([[0] * (1 + n % 7) for n in range(160)], [0] * 160)
    batches = list(runs.batches_of(examples, 20, seed=0))
    for half in (batches[:10], batches[10:]):
        assert sorted(row for batch in half for row in batch) == list(range(160))
    assert batches == list(runs.batches_of(examples, 20, seed=0))
    assert batches[:10] != batches[10:]


def test_an_adapter_read_from_its_files_predicts_as_the_trained_model_did(tmp_path):
    base, lora = demo.model_folder(), next(method for method in runs.METHODS if method.name == "lora")
    some = runs.Encoded([[101, 2000 + n, 2100, 102] for n in range(16)], [n % 3 for n in range(16)])
    run = runs.Run(base, lora, 1e-2, 3, 3, 3, some, {"test": some}, tmp_path)
    outcome = run(lambda cost: None)
    assert outcome.peak_bytes >= outcome.start_bytes > 0
    assert len(outcome.losses) == 3
    for folder, reader in (("lora", "rankfold"), ("lora-peft", "peft"), ("lora-peft", "rankfold")):
        found = runs.Reload(base, tmp_path / folder, reader, "lora", some, 3)(lambda cost: None)
        demo.check_equal(found, outcome.logits["test"], folder)


def test_predictions_that_differ_are_noticed():
    demo.check_equal([[0.0, 1.0]], [[1e-5, 1.0]], "same")
    with pytest.raises(AssertionError, match="swapped"):
        demo.check_equal([[0.0, 1e-5]], [[1e-5, 0.0]], "swapped")
    with pytest.raises(AssertionError, match="far"):
        demo.check_equal([[0.0, 1.0]], [[0.0, 1.1]], "far")


def test_a_score_counts_the_most_probable_and_averages_the_cross_entropy():
    score = demo.Score.of([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [2, 1])
    assert (score.right, score.count) == (1, 2)
    assert score.loss == pytest.approx((0.5514447 + 1.0986123) / 2)


@pytest.fixture
def pieces(tmp_path, monkeypatch) -> Iterator[object]:
    """A module of work that another process can import."""
    (tmp_path / "pieces.py").write_text(
        "import os\n"
        "def report_process(notify):\n    notify(0.5)\n    notify(0.5)\n    return os.getpid()\n"
        "def leave(notify):\n    os._exit(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import pieces

    yield pieces
    del sys.modules["pieces"]


def test_every_piece_of_work_has_a_process_of_its_own(pieces):
    amounts: list[float] = []
    work = [pieces.report_process] * 3
    found = dict(processes.in_fresh_processes(work, workers=2, preload=[], notify=amounts.append))
    assert sorted(found) == [0, 1, 2]
    assert len({*found.values()}) == 3
    assert sum(amounts) == 3


def test_a_process_that_ends_without_a_result_is_an_error(pieces):
    with pytest.raises(RuntimeError, match="exit code 3"):
        list(processes.in_fresh_processes([pieces.leave], workers=1, preload=[], notify=print))


def a_story() -> report.Story:
    """A story of six methods, with text that must be escaped."""
    trained = (3_850, 22_717_066, 341_770, 362_890, 13_322, 34_442)
    rows = [
        report.Row(
            method.name,
            None,
            0.01,
            480 + 30 * n,
            1000,
            trained[n],
            40.0 + n,
            900 << 20,
            500 << 20,
            [2.0, 1.5, 1.0],
        )
        for n, method in enumerate(runs.METHODS)
    ]
    sweep = {row.name: [(0.01, 0.4, 1.7)] for row in rows}
    quote = report.Prediction("Is <b>x</b> & y", "torch.nn", "sklearn")
    return report.Story(rows, sweep, ["Data."], ["Protocol."], "Reload.", [quote], ["a > b"])


class Page(HTMLParser):
    """What a test asks of a page: whether its tags are balanced, its attributes and its text."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return report.write_report(a_story(), tmp_path_factory.mktemp("report"))


def test_the_report_is_well_formed(written):
    page = Page(written.read_text())
    assert page.open == []
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {value[1:] for name, value in page.attributes if name.endswith("href")}
    referred |= set(re.findall(r"url\(#([^)]*)\)", written.read_text()))
    assert referred <= set(ids)


def test_the_report_needs_no_other_file(written):
    text = written.read_text()
    for name, value in Page(text).attributes:
        assert name not in ("src", "srcset", "data", "action")
        assert not name.endswith("href") or value.startswith("#")
        assert "://" not in value or name.startswith("xmlns")
    assert "@import" not in text
    assert "<script" not in text
    assert not re.search(r"url\((?!#)", text)


def test_the_report_tells_the_whole_story(written):
    text = Page(written.read_text()).text
    for row in a_story().rows:
        assert all(cell in text for cell in row.cells())
    assert "Is <b>x</b> & y" in text
    assert "a > b" in text
    assert written.read_text().count("<svg") == 2


def test_the_pictures_follow_the_colours_of_the_page(written):
    text = written.read_text()
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--ink)" in pictures
    assert not re.search(r"#[0-9a-f]{6}", pictures)
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined
    light, dark = text.split("prefers-color-scheme: dark")[:2]
    for variable in set(re.findall(r"var\((--(?:ink|faint|method-\d))\)", pictures)):
        assert f"{variable}:" in light
        assert f"{variable}:" in dark


@pytest.mark.parametrize("spread", [5, 10, 19, 30])
def test_the_marks_of_the_accuracy_axis_are_where_they_say(spread):
    rows = [replace(row, right=545 + spread * place) for place, row in enumerate(a_story().rows)]
    axes = report.accuracy_figure(rows).axes[0]
    marks = axes.yaxis.get_major_ticks()
    axes.figure.draw_without_rendering()
    assert len(marks) > 3
    for mark in marks:
        assert float(mark.label1.get_text().removesuffix(" %")) == pytest.approx(100 * mark.get_loc())


def test_the_picture_for_other_pages_is_a_png_and_nothing_else_is_left(written):
    assert (written.parent / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in written.parent.iterdir()} == {"accuracy.png", "report.html"}


def test_the_same_results_give_the_same_files(written, tmp_path):
    again = report.write_report(a_story(), tmp_path)
    for name in ("report.html", "accuracy.png"):
        assert (written.parent / name).read_bytes() == (again.parent / name).read_bytes()


@pytest.mark.parametrize("module", [demo, docstrings, report], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_hold(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_from_end_to_end(tmp_path):
    command = [sys.executable, EXAMPLES / "demo.py", "--out", tmp_path, "--steps", "3", "--sweep-steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "What to type next" in done.stdout
    assert done.stderr == ""
    assert (tmp_path / "report.html").is_file()
