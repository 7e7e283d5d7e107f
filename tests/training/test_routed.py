"""Routers of mixtures inside the Trainer: their own losses reach them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from formats.test_trainer import rows, sharp_base
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible
from rankfold.layers import NeverRead, require
from rankfold.training.routed import routed_trainer
from rankfold.weights import Router


def routers(model: nn.Module) -> list[torch.Tensor]:
    expressions = require(model).expressions("default").values()
    return [part.matrix.tensor() for e in expressions for part in e.modules() if isinstance(part, Router)]


def train(
    kind: type[hf.Trainer], model: nn.Module, folder: Path, *, attached: bool = False, **options: Any
) -> float:
    """Train for some steps and return the mean loss that the Trainer logged."""
    arguments = hf.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, logging_strategy="no", save_strategy="no", seed=5, **options,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-3))
    callbacks = [rf.TrainerCallback()] if attached else []
    training = kind(
        model, arguments, train_dataset=rows(24), callbacks=callbacks, optimizers=(optimizer, None)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", NeverRead)
        return float(training.train().training_loss)


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("how", ["callback", "class", "both"])
def test_the_balance_loss_of_a_mixture_is_added_once_a_step(
    how: str, accumulated: int, tmp_path: Path
) -> None:
    kind = hf.Trainer if how == "callback" else routed_trainer()
    losses = []
    for balance in (0.0, 1.0):
        model = rf.adapt(sharp_base(), "mixture", rank=2, experts=3, targets="*.q_proj", balance=balance)
        for matrix in routers(model):
            matrix.data.zero_()
        attached = how != "class"
        losses.append(
            train(kind, model, tmp_path, attached=attached, gradient_accumulation_steps=accumulated)
        )
    assert losses[1] - losses[0] == pytest.approx(
        len(routers(model)), rel=0.02
    )  # 1 a layer at uniform routing


@pytest.mark.parametrize("attached", [False, True])
def test_routers_of_drawn_experts_learn(attached: bool, tmp_path: Path) -> None:
    model = rf.adapt(sharp_base(), "remix", rank=2, experts=3)
    for expression in require(model).expressions("default").values():
        expression.leaf("up").tensor().data.normal_(std=0.1)
    before = [matrix.detach().clone() for matrix in routers(model)]
    train(routed_trainer(), model, tmp_path, attached=attached)
    assert all(not torch.equal(old, new) for old, new in zip(before, routers(model), strict=True))


def test_a_trainer_that_gives_drawn_experts_no_loss_of_their_own_is_warned_about(tmp_path: Path) -> None:
    model = rf.adapt(sharp_base(), "remix", rank=2, experts=3)
    with pytest.raises(NeverRead, match="remix_loss"):
        train(hf.Trainer, model, tmp_path)


def test_the_callback_refuses_drawn_experts_in_a_trainer_that_gives_them_no_loss(tmp_path: Path) -> None:
    model = rf.adapt(sharp_base(), "remix", rank=2, experts=3)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    sentence = r"rankfold.remix_loss .*rankfold.training.routed.routed_trainer\(\)"
    with pytest.raises(Incompatible, match=sentence):
        train(hf.Trainer, model, tmp_path, attached=True)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    train(routed_trainer(), model, tmp_path, attached=True)
    with pytest.raises(Incompatible, match=sentence):
        train(hf.Trainer, model, tmp_path, attached=True)
