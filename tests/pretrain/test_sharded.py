"""What shards are stored as, in a group of one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM

import rankfold as rf
from rankfold.pretrain.ladder import Rung
from rankfold.pretrain.memory import held_bytes
from rankfold.pretrain.sharded import full_state, load_local_state, local_state, shard

SIZE = Rung(16, 24, 2, 2, 32)
IDS = torch.arange(12)[None]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _sharded() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(SIZE.config())
    shard(model, torch.device("cpu"))
    return model


def _step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


@pytest.mark.usefixtures("group")
def test_blocks_are_sharded_one_by_one_and_the_whole_is_found_again() -> None:
    torch.manual_seed(0)
    whole = LlamaForCausalLM(SIZE.config()).state_dict()
    model = _sharded()
    assert all(isinstance(module, FSDPModule) for module in (model, *model.model.layers))
    found = full_state(model)
    assert found.keys() == whole.keys()
    assert all(type(found[name]) is torch.Tensor and torch.equal(found[name], whole[name]) for name in whole)
    assert held_bytes(model.lm_head.weight) == 4 * model.lm_head.weight.numel()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_a_state_that_is_stored_by_shards_goes_on_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        if name == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=0.1)
        return rf.optim.galore(model, rank=4, refresh=3)

    model = _sharded()
    optimizer = make(model)
    for _ in range(2):
        _step(model, optimizer)
    torch.save(local_state(optimizer), tmp_path / "state.pt")
    again = _sharded()
    with torch.no_grad():
        for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    restored = make(again)
    load_local_state(restored, torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):
        _step(model, optimizer)
        _step(again, restored)
    first, second = full_state(model), full_state(again)
    assert all(torch.equal(first[key], second[key]) for key in first)
