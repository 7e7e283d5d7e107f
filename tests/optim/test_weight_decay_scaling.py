"""Decay grows with the root of the width, which keeps the scale that AdamW's matrices settle at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from layers.models import llama, seeded
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible


def network(width: int) -> nn.Module:
    parts = {
        "embed": nn.Embedding(10, width),
        "norm": nn.RMSNorm(width),
        "mid": nn.Linear(width, 2 * width),
        "back": nn.Linear(2 * width, width, bias=False),
        "lm_head": nn.Linear(width, 10, bias=False),
    }
    return nn.ModuleDict(parts)


def rates(width: int, **options: Any) -> dict[str, tuple[float, float]]:
    model, base = network(width), network(16)
    groups = rf.optim.weight_decay_scaling(rf.optim.mup_model(model, base), 0.01, base=base, **options)
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name, _ in g["params"]}


@pytest.mark.parametrize("width", [16, 32, 64, 400])
def test_the_scale_that_matrices_settle_at_is_the_same_at_every_width(width: int) -> None:
    found = rates(width, weight_decay=0.1)
    for name in ("mid.weight", "back.weight"):
        lr, decay = found[name]
        assert math.sqrt(lr / decay) * width**0.75 == pytest.approx(math.sqrt(0.01 / 0.1) * 16**0.75)
        assert lr == pytest.approx(0.01 * 16 / width)


@pytest.mark.parametrize("width", [16, 64])
def test_embeddings_gains_biases_and_heads_keep_their_rate_and_have_no_decay(width: int) -> None:
    found = rates(width)
    for name in ("embed.weight", "norm.weight", "mid.bias", "lm_head.weight"):
        assert found[name] == (0.01, 0.0), name


def test_a_transformer_is_split_into_matrices_and_others_at_its_base_too() -> None:
    model = seeded(llama)
    groups = rf.optim.weight_decay_scaling(model, base=model)
    decayed = {name for group in groups if group["weight_decay"] for name, _ in group["params"]}
    assert decayed == {name for name, _ in model.named_parameters() if "proj" in name}
    torch.optim.AdamW(groups)
    with pytest.raises(Incompatible, match="has no like in the base model"):
        rf.optim.weight_decay_scaling(model, base={})
