from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import rankfold as rf
from rankfold.pretrain import PretrainConfig, StepMemory, memory
from rankfold.pretrain.ladder import Rung
from rankfold.pretrain.memory import held_bytes, predict_state, state_bytes, table
from rankfold.pretrain.optimizers import OptimizerPlan

SIZE = Rung(64, 128, 2, 4, 256)
OPTIMIZERS = ["adamw", "galore", "fira", "frugal", "flora", "dct-projection", "online-subspace-descent"]


def _plan(model: nn.Module, name: str) -> OptimizerPlan:
    return OptimizerPlan.of(model, PretrainConfig("0.1M", optimizer=name))  # type: ignore[arg-type]


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_predicted_to_the_byte_without_the_weights(name: str) -> None:
    model = LlamaForCausalLM(SIZE.config())
    with torch.device("meta"):
        blank = LlamaForCausalLM(SIZE.config())
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = _plan(model, name).build(model)
    optimizer.step()
    assert predict_state(_trained(blank), _plan(blank, name).small) == state_bytes(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_copies_tell_the_state_of_large_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(SIZE.config())
    make = _plan(model, name).small
    direct = predict_state(_trained(model), make)
    monkeypatch.setattr(memory, "DIRECT", SIZE.parameters() // 2)
    assert predict_state(_trained(model), make) == pytest.approx(direct, rel=1e-3)


def test_an_optimizer_that_cannot_step_alone_has_no_prediction() -> None:
    class Refuses(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError

    found = predict_state(
        [("w", nn.Parameter(torch.ones(2)))], lambda named, _: Refuses([p for _, p in named])
    )
    assert found is None
    assert "not known" in str(StepMemory(1, 1, None, 1))
    assert StepMemory(1, 1, None, 1).total is None


def test_galore_keeps_less_than_adamw_and_both_are_known_for_seven_billion_weights() -> None:
    from rankfold.pretrain.ladder import LADDER

    with torch.device("meta"):
        model = LlamaForCausalLM(LADDER["7B"].config())
    kept = {name: predict_state(_trained(model), _plan(model, name).small) for name in ("adamw", "galore")}
    parameters = LADDER["7B"].parameters()
    assert kept["adamw"] == pytest.approx(8 * parameters, rel=1e-3)
    side, wide, rank, plain = 4096, 11008, 1024, 2 * 32_000 * 4096
    low = 4 * (3 * side * rank) + 3 * (side * rank + 2 * wide * rank)  # bases of the shorter sides, moments
    assert kept["galore"] == pytest.approx(4 * (32 * low + 2 * plain), rel=2e-3)


def test_quantised_moments_are_counted_as_they_are_stored() -> None:
    subclasses = pytest.importorskip("torchao.optim.subclass_8bit")
    moment = subclasses.OptimState8bit.zeros((64, 128), signed=True, block_size=256)
    assert held_bytes(moment) == 64 * 128 + 4 * 64 * 128 // 256 + 4 * 256  # codes, scales, the code book


def test_the_plan_of_a_structure_counts_what_trains() -> None:
    model: Any = LlamaForCausalLM(SIZE.config())
    rf.adapt(model, "low-rank", rank=4)
    plan = memory.predict(model, _plan(model, "adamw").small, 64, 4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.gradients == 4 * trained
    assert plan.optimizer == pytest.approx(8 * trained, rel=1e-2)


def test_prediction_and_count_stand_beside_each_other() -> None:
    shown = table(StepMemory(2**20, 2**21, 2**22, 2**23), StepMemory(2**20, 2**21, None, 2**23))
    rows = [line.split() for line in shown.splitlines()]
    assert rows[0] == ["predicted", "measured"]
    assert ["optimizer", "4.0", "MiB", "not", "known"] in rows
    assert ["total", "15.0", "MiB", "not", "known"] in rows
