"""Two processes: data parallel and fully sharded training of adapters."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layers.models import VOCABULARY, bert, gradients, llama, perturb, seeded
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import rankfold as rf

pytestmark = pytest.mark.slow
PROCESSES = 2
METHODS: dict[str, dict[str, Any]] = {
    "lora": {}, "lora/pissa": {}, "dora": {}, "vera": {"rank": 4}, "uni-lora": {}, "hira": {}, "hra": {},
    "alora": {"invocation": (5,)}, "reft": {"positions": "f2+l1"},
}  # fmt: skip


def ids_of(rank: int) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(rank))
    ids[:, 2] = 5
    return ids


def model_of(method: str) -> Any:
    model: Any = seeded(llama).train()
    rf.adapt(model, method, **{"rank": 2, "train": ("model.norm",), **METHODS[method]})
    perturb(model)
    return model


def loss_of(model: nn.Module, rank: int) -> Tensor:
    ids = ids_of(rank)
    result: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return result


def alone(method: str) -> dict[str, Tensor]:
    """Return the gradients of the mean loss, in one process."""
    model = model_of(method)
    (sum(loss_of(model, rank) for rank in range(PROCESSES)) / PROCESSES).backward()  # type: ignore[union-attr]
    return gradients(model)


def in_processes(work: Callable[[int], None], tmp_path: Path) -> None:
    """Run `work(rank)` in every process of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_enter, args=(work, port), nprocs=PROCESSES)


def _enter(rank: int, work: Callable[[int], None], port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    try:
        work(rank)
    finally:
        dist.destroy_process_group()


def data_parallel(rank: int) -> None:
    for method in METHODS:
        model = model_of(method)
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss_of(wrapped, rank).backward()
        found, wanted = gradients(model), alone(method)
        assert set(found) == set(wanted), method
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-3, msg=f"{method}: {name}")
        with rf.disabled(model), torch.no_grad():
            loss_of(wrapped, rank)
        loss_of(wrapped, rank).backward()


def heads(rank: int) -> None:
    model: Any = seeded(bert).train()
    rf.adapt(model, "lora", rank=2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        wrapped(input_ids=ids_of(rank), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        values = [torch.empty_like(parameter) for _ in range(PROCESSES)]
        dist.all_gather(values, parameter.detach().contiguous())
        assert torch.equal(values[0], values[1]), name


def sharded(rank: int) -> None:
    for method in METHODS:
        model = model_of(method)
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        loss_of(model, rank).backward()
        wanted = alone(method)
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        assert set(found) == set(wanted), method
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-3, msg=f"{method}: {name}")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        before = loss_of(model, rank)
        before.backward()
        optimizer.step()
        assert loss_of(model, rank) < before, method


def test_data_parallel_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    in_processes(data_parallel, tmp_path)


def test_data_parallel_training_keeps_heads_and_adapters_alike(tmp_path: Path) -> None:
    in_processes(heads, tmp_path)


def test_fully_sharded_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    in_processes(sharded, tmp_path)
