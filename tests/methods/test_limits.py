"""A number or word that an option cannot have is refused by the option's name, its limits and its value."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.limits import in_range
from rankfold.methods.ranks.gora import gora
from rankfold.methods.ranks.sensitivity_lora import sensitivity_lora

RESOLVED: list[tuple[str, str, dict[str, Any], str]] = [
    ("ranks", "adalora", {"beta1": 1.5}, "beta1 must be in [0, 1), not 1.5"),
    ("ranks", "adalora", {"initial": 0.5}, "initial must be at least 1, not 0.5"),
    ("ranks", "adalora", {"warmup": 0.5, "final": 0.5}, "warmup and final must together be below 1, not 1"),
    ("ranks", "dora-dynamic", {"equilibrium": -1.0}, "equilibrium must be at least 0, not -1.0"),
    ("ranks", "dora-dynamic", {"start": 0.6}, "start and final must together be below 1, not 1.1"),
    ("ranks", "increlora", {"growth": 0}, "growth must be at least 1, not 0"),
    ("ranks", "increlora", {"score": "both"}, "score must be one of weights, factors, not 'both'"),
    ("ranks", "elalora", {"exchange": -1}, "exchange must be at least 0, not -1"),
    ("ranks", "elalora", {"final": 1.0}, "final must be in [0, 1), not 1.0"),
    ("ranks", "sora", {"stages": 0}, "stages must be at least 1, not 0"),
    ("ranks", "codyra", {"levels": 1}, "levels must be at least 2, not 1"),
    ("ranks", "ard-lora", {"most": 0.5}, "most must be at least 1, not 0.5"),
    ("ranks", "lora-squeeze", {"moments": "keep"}, "moments must be one of transfer, reset, not 'keep'"),
    ("ranks", "prilora", {"last": -1.0}, "last must be positive, not -1.0"),
    ("dynamics", "allora", {"eta": 0.0}, "eta must be positive, not 0.0"),
    ("dynamics", "lora+", {"ratio": -2.0}, "ratio must be positive, not -2.0"),
    ("dynamics", "lora-pro", {"max_norm": 0.0}, "max_norm must be positive, not 0.0"),
    ("dynamics", "loft", {"eps": -1.0}, "eps must be at least 0, not -1.0"),
    ("dynamics", "periodic-lora", {"share": 0.0}, "share must be in (0, 1], not 0.0"),
    ("dynamics", "refactorisation", {"reset_interval": 0}, "reset_interval must be at least 1, not 0"),
    ("dynamics", "relora", {"prune": 1.1}, "prune must be in [0, 1], not 1.1"),
    ("dynamics", "relora", {"interval": 5, "warmup": 6}, "warmup must be in [0, 5], not 6"),
    ("dynamics", "shrink-perturb", {"interval": 9, "noise": -1.0}, "noise must be at least 0, not -1.0"),
    ("dynamics", "shrink-perturb", {"at": [3, 0]}, "at must be at least 1, not 0"),
    ("dynamics", "switchlora", {"freeze": 0}, "freeze must be at least 1, not 0"),
]


@pytest.mark.parametrize(("axis", "name", "options", "sentence"), RESOLVED, ids=str)
def test_an_option_of_a_rule_or_a_dynamics_is_named_with_its_value(
    axis: str, name: str, options: dict[str, Any], sentence: str
) -> None:
    build = next(method.build for method in rf.methods(axis) if method.name == name)
    with pytest.raises(InvalidOption, match=f"^{re.escape(f'{name}: {sentence}')}$"):
        build(**options)


BUILT: list[tuple[str, dict[str, Any], str]] = [
    ("kaiming", {"a": -1.0}, "kaiming: a must be at least 0, not -1.0"),
    ("pissa", {"iterations": -1}, "pissa: iterations must be at least 0, not -1"),
    ("lora-ga", {"scale": "x"}, "lora-ga: scale must be one of stable, unit, gd, weightS, not 'x'"),
    ("lora-ga", {"gamma": 0.0}, "lora-ga: gamma must be positive, not 0.0"),
    ("corda", {"method": "ipa"}, "corda: method must be one of ipm, kpm, not 'ipa'"),
    ("corda", {"damping": -1.0}, "corda: damping must be at least 0, not -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "sentence"), BUILT, ids=str)
def test_an_option_of_an_initialiser_is_named_with_its_value(
    name: str, options: dict[str, Any], sentence: str
) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    data = [torch.ones(2, 6)] if name in ("lora-ga", "corda") else None
    with pytest.raises(InvalidOption, match=f"^{re.escape(sentence)}$"):
        rf.adapt(
            model,
            rf.Recipe("lora", init=(name, options)),
            rank=2,
            data=data,
            loss=lambda model, batch: model(batch).square().mean(),
        )


@pytest.mark.parametrize(
    ("rule", "options", "sentence"),
    [
        (gora, {"minimum": 2.0, "maximum": 1.0}, "gora: minimum must be in [0, 1.0], not 2.0"),
        (gora, {"maximum": 0.5}, "gora: maximum must be at least 1, not 0.5"),
        (gora, {"cost": "none"}, "gora: cost must be one of linear, root, log, not 'none'"),
        (sensitivity_lora, {"top": 0.0}, "sensitivity-lora: top must be in (0, 1], not 0.0"),
        (
            sensitivity_lora,
            {"local": "trace"},
            "sensitivity-lora: local must be one of top-k, effective-rank, not 'trace'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_of_a_rule_decided_before_training_is_named_with_its_value(
    rule: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidOption, match=f"^{re.escape(sentence)}$"):
        rule([], 4, **options)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5), (-0.1, 1, float("nan"))),
        ("(0, 1]", (0.1, 1), (0, 1.1)),
        ("[1, inf)", (1, 1e9), (0.9, float("inf"))),
        ("(0, inf)", (1e-9,), (0, -1)),
    ],
)
def test_a_square_bracket_includes_its_end_and_a_round_one_does_not(
    interval: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    for value in inside:
        in_range("it", interval, option=value, left_open=None)
    for value in outside:
        with pytest.raises(InvalidOption, match="it: option must be"):
            in_range("it", interval, option=value)
