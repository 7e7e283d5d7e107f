"""A user's own table of ranks."""

import ast
import re
from typing import Any

import pytest
import torch
from hosts import blocks

import rankfold as rf
from rankfold.errors import InvalidOption, InvalidRank
from rankfold.methods.ranks.table import table
from rankfold.methods.rules import Unit
from rankfold.training.config import parse_options
from rankfold.training.run import recipe

PATHS = [f"blocks.{i}.{name}" for i in range(2) for name in ("attention", "up", "down")]


def ranks(entries: dict[str, Any], rank: int = 3) -> dict[str, int]:
    return table([Unit(path, (8, 8), limit=8) for path in PATHS], rank, ranks=entries)


def test_paths_and_patterns_are_those_of_targets_and_the_rest_gets_the_asked_rank() -> None:
    found = ranks({"blocks.0.up": 5, "attention": 2, r"re:.*\.1\.down": 0})
    assert found == dict(zip(PATHS, [2, 5, 3, 2, 3, 0], strict=True))


@pytest.mark.parametrize("turned", [False, True])
def test_the_most_specific_entry_counts_whatever_the_order(turned: bool) -> None:
    entries = [("*", 1), ("blocks.1.*", 2), ("blocks.1.u*", 4), ("blocks.1.down", 6), ("*down", 1)]
    found = ranks(dict(entries[::-1] if turned else entries))
    assert found == dict(zip(PATHS, [1, 1, 1, 2, 4, 6], strict=True))


def test_a_path_counts_before_a_pattern_that_means_it_alone() -> None:
    assert ranks({"blocks.0.u*": 2, "blocks.0.up": 5})["blocks.0.up"] == 5


def test_entries_that_overlap_and_agree_are_fine_and_others_are_refused() -> None:
    assert ranks({"blocks.0.*": 2, "*.up": 2})["blocks.0.up"] == 2
    with pytest.raises(InvalidOption, match=r"gives blocks.0.up the rank 2, '\*.up' gives it 4, and neither"):
        ranks({"blocks.0.*": 2, "*.up": 4})
    assert ranks({"blocks.0.*": 2, "*.up": 4, "blocks.0.up": 1})["blocks.0.up"] == 1


def test_an_entry_that_means_nothing_is_refused_with_near_names() -> None:
    with pytest.raises(
        InvalidOption, match="'atention' means no weight that is adapted; did you mean attention"
    ):
        ranks({"atention": 2})


@pytest.mark.parametrize("value", [-1, 2.0, True, "4", None])
def test_an_entry_that_is_no_rank_is_refused(value: Any) -> None:
    with pytest.raises(InvalidOption, match="the rank of 'up' must be a whole number of at least 0"):
        ranks({"up": value})


@pytest.mark.parametrize("value", [None, {}])
def test_without_a_table_it_says_how_one_is_given(value: Any) -> None:
    with pytest.raises(InvalidOption, match="table needs the ranks that you choose, as its option ranks"):
        ranks(value)


@pytest.mark.parametrize("name", ["table", "autolora", "rankadaptor", "airllm", "pearl"])
def test_what_the_sentence_without_a_table_says_works_in_python_and_on_the_command_line(name: str) -> None:
    with pytest.raises(InvalidOption) as refused:
        rf.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), f"lora/ranks={name}", rank=2)
    part, flag = re.findall(r"ranks=(.*\))\) in Python, --set '(.*)' on the command", str(refused.value))[0]
    assert ast.literal_eval(part) == (name, {"ranks": {"*.attention.*": 4}})
    assert recipe(f"lora/ranks={name}", parse_options([flag])).ranks == ast.literal_eval(part)


def adapted(entries: dict[str, int], structure: Any = "lora", **options: Any) -> Any:
    return rf.adapt(blocks(), rf.Recipe(structure, ranks=("table", {"ranks": entries})), rank=4, **options)


def test_the_adapter_has_the_ranks_of_the_table_and_its_own_scaling() -> None:
    with pytest.warns(UserWarning, match=r"blocks.1.down: table gave it no rank"):
        model = adapted({"attention": 2, "blocks.1.down": 0}, alpha=8)
    found = model.__dict__["_rankfold"].expressions("default")
    pairs = {path: next(e.pairs()) for path, e in found.items()}
    assert {path: pair.up.shape[1] for path, pair in pairs.items()} == {
        "blocks.0.attention": 2, "blocks.0.up": 4, "blocks.0.down": 4,
        "blocks.1.attention": 2, "blocks.1.up": 4,
    }  # fmt: skip
    assert {pair.scale for pair in pairs.values()} == {2.0, 4.0}


def test_a_rank_that_a_weight_cannot_hold_is_refused_with_the_weight() -> None:
    with pytest.raises(InvalidRank, match=r"blocks.0.up: rank 9 is more than its weight \(12x8\) can hold"):
        adapted({"blocks.0.up": 9})
    with pytest.raises(InvalidRank, match=r"blocks.0.up: table gave it the rank 3"):
        adapted({"blocks.0.up": 3}, "hra")
