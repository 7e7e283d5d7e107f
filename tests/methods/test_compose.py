"""Why a point makes no sense is said from what its methods declare of themselves."""

from __future__ import annotations

import pytest

import rankfold as rf
from rankfold.errors import Incompatible
from rankfold.methods import registry
from rankfold.methods.compose import Chosen, check, reasons


def chosen(axis: str, name: str) -> Chosen:
    method = registry.get(axis, name)
    return Chosen(method, method.checked({}))


@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        ("diablo/uniform", "diablo has no rank that uniform could share out"),
        ("lora-xs/adalora", "adalora gates terms of a trained product of two factors, and lora-xs has none"),
        ("lora-xs/codyra", "codyra gates terms"),
        ("lora-xs/lora-squeeze", "lora-squeeze changes terms of a trained product"),
        ("svfit/prilora", "prilora also prunes the trained leaf that meets the input, and svfit has none"),
        ("reft/relora", "relora moves changes into stored weights, and reft changes activations"),
        ("lora/alpharl", "alpharl is no part of a training: call"),
        ("lora/adalora/lora-pro", "lora-pro needs the factors alone, and adalora puts a gate between them"),
        ("lora/prilora/lora-pro", "lora-pro needs the factors alone, and prilora changes them too"),
        ("lora/random", "random starts behind a gate that is zero, and only some rank rules open gates"),
        ("lora/random/adalora", ""),
        ("lora/lora-pro/loft", "lora-pro and loft both replace the optimizer's step"),
    ],
)
def test_a_point_has_the_reasons_that_its_methods_give(point: str, sentence: str) -> None:
    recipe = rf.parse_point(point)
    parts = [
        chosen(axis, str(name)) if (name := getattr(recipe, axis)) else None for axis in ("init", "ranks")
    ]
    dynamics = [chosen("dynamics", str(name)) for name in recipe.dynamics]
    asked = (chosen("structure", str(recipe.structure)), *parts, dynamics)
    found = list(reasons(*asked))
    if not sentence:
        assert found == []
        check(*asked)
        return
    assert any(reason.startswith(sentence) for reason in found), found
    with pytest.raises(Incompatible):
        check(*asked)
