"""The catalogue."""

import json
from importlib import metadata
from typing import Any

import pytest

import rankfold as rf
from rankfold.errors import UnknownMethod
from rankfold.methods import registry

# Title words, year and arXiv id of every paper, so that a slip in one file shows in another.
PAPERS = {
    "lora": ("Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"),
    "dora": ("Weight-Decomposed Low-Rank Adaptation", 2024, "2402.09353"),
    "vera": ("Vector-based Random Matrix Adaptation", 2023, "2310.11454"),
    "lora-xs": ("Extremely Small Number of Parameters", 2024, "2405.17604"),
    "hira": ("Hadamard High-Rank Adaptation", 2025, ""),
    "abba": ("Hadamard Product Adaptation", 2025, "2505.14238"),
    "gralora": ("Granular Low-Rank Adaptation", 2025, "2505.20355"),
    "diablo": ("Diagonal Blocks Are Sufficient", 2025, "2506.03230"),
    "uni-lora": ("One Vector is All You Need", 2025, "2506.00799"),
    "flora-tucker": ("Low-Rank Core Space for N-dimension", 2024, "2405.14739"),
    "svfit": ("Using Singular Values", 2024, "2409.05926"),
    "hra": ("Householder Reflection Adaptation", 2024, "2405.17484"),
    "reft": ("Representation Finetuning for Language Models", 2024, "2404.03592"),
    "alora": ("Fine-tuned LLMs for Intrinsics", 2025, "2504.12397"),
    "pissa": ("Principal Singular Values and Singular Vectors Adaptation", 2024, "2404.02948"),
    "olora": ("Orthonormal Low-Rank Adaptation", 2024, "2406.01775"),
    "kaiming": ("Delving Deep into Rectifiers", 2015, "1502.01852"),
    "init=svd": ("of lower rank", 1936, ""),
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_is_found_by_name_and_by_arxiv_id(name: str) -> None:
    words, year, arxiv = PAPERS[name]
    method = rf.find_method(name)
    assert words in method.title
    assert (method.year, method.arxiv) == (year, arxiv)
    if arxiv:
        assert rf.find_method(arxiv) is method
        assert arxiv[:2] == str(year)[2:]


def test_every_module_says_paper_equation_and_start_in_its_docstring() -> None:
    for method in (m for axis in ("structure", "init") for m in rf.methods(axis)):
        lines = method.doc.splitlines()
        assert lines[0].endswith("."), f"{method.name}: the first line is one sentence"
        assert any((line.startswith("    ") and "=" in line) or "~" in line for line in lines), (
            f"{method.name}: an equation"
        )
        assert str(method.year) in method.doc, f"{method.name}: the year of the paper"
        if method.axis == "structure":
            assert "Start:" in method.doc, f"{method.name}: where it starts"


def test_the_catalogue_is_ordered_by_axis_and_name() -> None:
    names = [(registry.AXES.index(m.axis), m.name) for m in rf.methods()]
    assert names == sorted(names)
    assert {m.name for m in rf.methods()} >= {name.rpartition("=")[2] for name in PAPERS}


def test_an_entry_is_plain_data() -> None:
    entry = json.loads(json.dumps(rf.find_method("gralora").to_dict()))
    assert entry["options"] == {"k": 2, "hybrid_rank": 0, "alpha": None}
    assert entry["start"] == "exactly the base's output"
    start = rf.find_method("lora-xs").to_dict()["start"]
    assert start == "the base's output within 0.001 of its largest entry"


@pytest.mark.parametrize(("query", "hint"), [("lora-sx", "lora-xs"), ("pisa", "pissa"), ("2405.17603", "")])
def test_an_unknown_name_is_answered_with_near_ones(query: str, hint: str) -> None:
    with pytest.raises(UnknownMethod, match=f"no method is called '{query}'.*{hint}"):
        rf.find_method(query)


def test_a_name_of_another_axis_is_said_to_be_there() -> None:
    with pytest.raises(UnknownMethod, match="no init is called 'dora'; 'dora' is of the axis structure"):
        registry.get("init", "dora")


def _register(name: str = "mine", axis: str = "structure", **about: Any) -> Any:
    entry = {"title": "Mine", "year": 2026, "formula": "W = W0", **about}

    def build(site: Any, rank: int, *, strength: float = 2.0) -> Any:
        """Return nothing."""

    return registry.register(axis, name, **entry)(build)


@pytest.mark.usefixtures("clean")
def test_options_and_defaults_are_read_from_the_signature() -> None:
    build = _register()
    method = rf.find_method("mine")
    assert method.build is build
    assert method.options == {"strength": 2.0}
    assert method.doc == "The catalogue."
    assert registry.axes_of("mine") == ["structure"]


@pytest.mark.usefixtures("clean")
def test_a_name_is_taken_once_per_axis() -> None:
    with pytest.raises(ValueError, match="cannot register structure 'lora'"):
        _register("lora")
    _register("lora", axis="compress")
    assert registry.axes_of("lora") == ["structure", "compress"]
    assert rf.find_method("compress=lora").title == "Mine"


def test_an_axis_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot register taste 'mine': the axis is unknown"):
        _register(axis="taste")


@pytest.mark.usefixtures("clean")
def test_another_package_adds_its_methods_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> None:
            _register("theirs")

    asked: list[str] = []

    def entry_points(*, group: str) -> list[Point]:
        asked.append(group)
        return [Point()]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    registry.load_all.cache_clear()
    assert rf.find_method("theirs").title == "Mine"
    assert asked == ["rankfold.methods"]


@pytest.mark.usefixtures("clean")
def test_annotations_that_only_a_type_checker_can_read_leave_options_unchecked() -> None:
    def build(site: "Unimportable", rank: int, *, strength: float = 2.0) -> Any:  # type: ignore[name-defined]  # noqa: F821
        """Return nothing."""

    registry.register("structure", "mine", title="Mine", year=2026, formula="W = W0")(build)
    assert rf.find_method("mine").checked({"strength": "strong"}) == {"strength": "strong"}
