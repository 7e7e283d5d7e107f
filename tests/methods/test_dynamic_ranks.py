"""What every rank rule that closes, opens or adds gated terms during training has in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hosts import Host
from methods._dynamic import LAYERS, Training, ignores_skipped_steps, resumes, runs_on

import rankfold as rf
from rankfold.errors import InvalidOption

RULES: dict[str, dict[str, Any]] = {
    "adalora": {"interval": 3},
    "dora-dynamic": {"interval": 3},
    "elalora": {"interval": 3, "exchange": 2},
    "increlora": {"growth": 1, "top": 1},
    "sora": {"threshold": 0.01, "penalty": 0.1},
}
named = pytest.mark.parametrize("name", RULES)


def point(name: str, structure: str = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return rf.Recipe(structure, init, (name, {**RULES[name], **options}))


@named
@pytest.mark.parametrize(
    ("structure", "init"), [("lora", None), ("dora", "pissa"), ("hira", None), ("abba", None)]
)
def test_training_resumes_bit_for_bit(name: str, structure: str, init: str | None, tmp_path: Path) -> None:
    resumes(point(name, structure, init), tmp_path)


@named
def test_skipped_steps_do_not_count(name: str) -> None:
    ignores_skipped_steps(point(name))


@named
@pytest.mark.parametrize("host", LAYERS, ids=lambda host: host.name)
def test_it_runs_on_every_kind_of_layer(name: str, host: Host) -> None:
    gentle = {"threshold": 1e-3, "penalty": 0.0} if name == "sora" else {}
    runs_on(point(name, **gentle), host)


WRONG: dict[str, list[dict[str, Any]]] = {
    "adalora": [{"initial": 0.5}, {"interval": 0}, {"beta1": 1.0}, {"orthogonality": -1.0}],
    "dora-dynamic": [{"initial": 0.9}, {"interval": 0}, {"beta": 1.0}, {"equilibrium": -1.0}],
    "elalora": [{"pool": 0}, {"exchange": -1}, {"interval": 0}, {"beta2": 1.0}],
    "increlora": [{"growth": 0}, {"top": 0}, {"warmup": 1.0}, {"score": "both"}, {"orthogonality": -1.0}],
    "sora": [{"threshold": -1.0}, {"penalty": -1.0}, {"stages": 0}, {"last": 1e-4, "stages": 2}],
}


@pytest.mark.parametrize(("name", "options"), [(n, each) for n in WRONG for each in WRONG[n]], ids=str)
def test_an_impossible_option_is_refused_by_its_name(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"{name}: {next(iter(options))} must be"):
        Training(point(name, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adalora", {"warmup": 0.6, "final": 0.5}),
        ("dora-dynamic", {"start": 0.6}),
        ("elalora", {"final": 0.95}),
        ("increlora", {"final": 0.9}),
    ],
)
def test_shares_that_leave_no_steps_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match=f"{name}: .* and final must together be below 1, not 1"):
        Training(point(name, **options))
