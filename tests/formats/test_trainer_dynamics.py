"""Dynamics and dynamic ranks inside transformers' Trainer: they act, and a resumed run ends the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from formats.test_trainer import rows, same, sharp_base, trained
from layers.models import VOCABULARY
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible
from rankfold.layers import require
from rankfold.weights import Moved

POINTS: dict[str, rf.Recipe] = {
    "adalora": rf.Recipe("lora", ranks=("adalora", {"interval": 1})),
    "dora/pissa/adalora": rf.Recipe("dora", "pissa", ("adalora", {"interval": 1})),
    "relora": rf.Recipe("lora", dynamics=(("relora", {"interval": 2, "warmup": 1}),)),
    "lora+": rf.Recipe("lora", dynamics=("lora+",)),
}


def fresh(point: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return rf.adapt(sharp_base(), POINTS[point], rank=3)


def trainer(model: nn.Module, folder: Path, **options: Any) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_strategy="no", seed=5, **options,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-2))
    return hf.Trainer(
        model,
        arguments,
        train_dataset=rows(12),
        callbacks=[rf.TrainerCallback()],
        optimizers=(optimizer, None),
    )


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(3, VOCABULARY)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("point", POINTS)
def test_a_resumed_run_ends_with_the_same_weights(point: str, tmp_path: Path) -> None:
    whole = fresh(point)
    trainer(whole, tmp_path / "whole").train()
    resumed = fresh(point)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert same(trained(resumed), trained(whole))
    last = rf.load(sharp_base(), tmp_path / "whole" / "checkpoint-6")
    torch.testing.assert_close(outputs(last), outputs(whole), rtol=1e-5, atol=1e-5)


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    model = fresh("relora")
    training = trainer(model, tmp_path, gradient_accumulation_steps=2)
    training.train()
    assert training.optimizer.param_groups[0]["rankfold"]["clock"] == 6


def test_a_budget_has_fallen_and_a_restart_has_moved_the_weight(tmp_path: Path) -> None:
    budget, moved = fresh("adalora"), fresh("relora")
    trainer(budget, tmp_path / "budget").train()
    trainer(moved, tmp_path / "moved").train()
    gates = [p.gate for e in require(budget).expressions("default").values() for p in e.pairs()]
    assert sum(int((gate.tensor() != 0).sum()) for gate in gates) == 3 * len(gates)
    expressions = require(moved).expressions("default").values()
    leaves = [leaf for e in expressions for leaf in e.leaves() if isinstance(leaf, Moved)]
    assert all(not torch.equal(leaf.value, leaf._holder[0].matrix()) for leaf in leaves)


def test_the_handle_is_gone_after_training(tmp_path: Path) -> None:
    model = fresh("relora")
    training = trainer(model, tmp_path)
    training.train()
    rf.attach(model, training.optimizer).remove()


def test_a_trainers_own_optimizer_lacks_the_rates_of_lora_plus(tmp_path: Path) -> None:
    training = trainer(fresh("lora+"), tmp_path)
    training.optimizer = None
    with pytest.raises(Incompatible, match="param_groups"):
        training.train()
