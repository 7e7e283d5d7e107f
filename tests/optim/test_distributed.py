"""Two processes: a projected optimizer takes the steps of one process on the whole batch."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import rankfold as rf
from rankfold import optim
from rankfold.errors import InvalidOption
from rankfold.optim import PROJECTORS, ProjectedOptimizer

PROCESSES = 2
OPTIONS: list[dict[str, Any]] = [
    *({"projector": name} for name in sorted(PROJECTORS)),
    *({"residual": name, "scale": 0.5} for name in ("scaled", "sign", "sgd", "sparse")),
    {"residual": "sign", "projector": "coordinates"},
    *({"inner": name} for name in ("lion", "adafactor")),
    {"transport": "rotate", "overlap": 0.5, "staggered": True, "side": "reverse"},
    {"transport": "reset", "clip": 0.01, "weight_decay": 0.1},
    {"named": "flora", "kappa": 2, "weight_decay": 0.1},
    {"named": "gradnormlorp", "refresh": 2},
    {"named": "gradnormlorp", "clip": 0.01},
    {"named": "galore+", "refresh": 3, "density": 0.1, "heads": {"5.weight": 3}},
]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return a model with wide, tall, square and convolutional weights, and odd numbers of rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(3, 7, 3, padding=1), nn.Tanh(), nn.Flatten(),
            nn.Linear(35, 9), nn.Tanh(), nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 13),
        ).to(dtype)  # fmt: skip


def loss_of(model: nn.Module, step: int, part: slice) -> Tensor:
    x = torch.randn(8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))[part]
    wanted = torch.tanh(x.sum((1, 2)))[:, None].expand(len(x), 13)
    given = x.to(next(model.parameters()).dtype)
    return (model(given).to(torch.float64) - wanted).square().mean()


def part_of(rank: int) -> slice:
    return slice(4 * rank, 4 * rank + 4)


def optimizer_of(model: nn.Module, named: str = "", **options: Any) -> ProjectedOptimizer:
    if named:
        built = rf.find_method(f"optim={named}").build(model.named_parameters(), 1e-2, rank=3, **options)
        return built  # type: ignore[no-any-return]
    return ProjectedOptimizer(model.named_parameters(), **{"lr": 1e-2, "rank": 3, "refresh": 2, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, part: slice) -> None:
    for step in steps:
        loss_of(model, step, part).backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(steps: int, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    """Return the weights after steps of one process on whole batches."""
    model = network(dtype)
    train(model, optimizer_of(model, **options), range(steps), slice(None))
    return {name: value.detach() for name, value in model.named_parameters()}


def sharded(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = network(dtype)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in ((n, p.detach()) for n, p in model.named_parameters())
    }


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], about: object) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-7, msg=f"{about}: {name}")


def data_parallel_steps_are_those_of_one_process(rank: int, folder: Path) -> None:
    for options in OPTIONS[::5]:  # nothing of theirs knows of the other process
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(wrapped, optimizer_of(model, **options), range(3), part_of(rank))
        assert_alike(whole(model), alone(3, **options), options)
        for name, value in whole(model).items():
            both = [torch.empty_like(value) for _ in range(PROCESSES)]
            dist.all_gather(both, value.contiguous())
            assert torch.equal(*both), (options, name)


def fully_sharded_steps_are_those_of_one_process(rank: int, folder: Path) -> None:
    for options in OPTIONS:
        model = sharded()
        train(model, optimizer_of(model, **options), range(3), part_of(rank))
        assert_alike(whole(model), alone(3, **options), options)


def named_optimizers_take_the_steps_of_one_process(rank: int, folder: Path) -> None:
    made: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "galore+": lambda model: optim.galore_plus(model, rank=3, refresh=2),
        "gradnormlorp": lambda model: optim.gradnormlorp(model, rank=3, refresh=2),
        "flora": lambda model: optim.flora(model, rank=3, kappa=2),
        "frugal": lambda model: optim.frugal(model, projector="blocks", density=0.5, refresh=1),
    }
    for name, make in made.items():
        plain, model = network(), sharded()
        train(plain, make(plain), range(3), slice(None))
        train(model, make(model), range(3), part_of(rank))
        assert_alike(whole(model), whole(plain), name)
        assert not torch.equal(plain[3].weight, network()[3].weight)


def moments_and_bases_are_shards(rank: int, folder: Path) -> None:
    model = sharded()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(1), part_of(rank))
    for parameter in model.parameters():
        for name, value in optimizer.state[parameter].items():
            if value.dim() and value.is_floating_point():
                assert isinstance(value, DTensor), name
                assert value.to_local().numel() < 0.7 * value.numel(), name


def half_precision_weights_keep_a_sharded_copy(rank: int, folder: Path) -> None:
    model = sharded(torch.bfloat16)
    optimizer = optimizer_of(model, rounding="master", lr=1e-4)
    train(model, optimizer, range(2), part_of(rank))
    for parameter in model.parameters():
        master = optimizer.state[parameter]["master"]
        assert master.dtype == torch.float32
        assert torch.equal(master.full_tensor().bfloat16(), parameter.detach().full_tensor())


def stochastic_rounding_differs_between_shards(rank: int, folder: Path) -> None:
    model = fully_shard(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
    with torch.no_grad():
        model.weight.to_local().fill_(1.0)
    optimizer = optimizer_of(model, rounding="stochastic", lr=2**-9, projector="coordinates", rank=64)
    model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    moved = model.weight.detach().full_tensor().float()
    assert float(moved.mean()) == pytest.approx(1 - 2**-9, abs=2e-4)
    assert not torch.equal(*moved.chunk(2))


def steps_in_backward_are_those_of_step(rank: int, folder: Path) -> None:
    models = [sharded(), sharded()]
    optimizers = [optimizer_of(model) for model in models]
    optimizers[1].step_in_backward()
    train(models[0], optimizers[0], range(4), part_of(rank))
    for step in range(4):
        loss_of(models[1], step, part_of(rank)).backward()
        assert all(p.grad is None for p in models[1].parameters())
    assert_alike(whole(models[1]), whole(models[0]), "in backward")


def a_gradient_that_is_not_finite_in_one_process_is_refused_in_all(rank: int, folder: Path) -> None:
    model = sharded()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2), part_of(rank))
    before = whole(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if rank == 1:
        model[3].weight.grad.to_local()[0, 0] = torch.nan
    with pytest.raises(InvalidOption, match=r"the gradient of 3\.weight is not finite"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in whole(model).items())


def a_distributed_checkpoint_goes_on_bit_for_bit(rank: int, folder: Path) -> None:
    for number, options in enumerate(({}, {"residual": "scaled", "transport": "rotate", "overlap": 0.5})):
        models = [sharded(), sharded()]
        first, second = (optimizer_of(model, **options) for model in models)
        train(models[0], first, range(4), part_of(rank))
        saved = {
            "model": get_model_state_dict(models[0]),
            "optim": get_optimizer_state_dict(models[0], first),
        }
        dcp.save(saved, checkpoint_id=folder / str(number))
        found = {
            "model": get_model_state_dict(models[1]),
            "optim": get_optimizer_state_dict(models[1], second),
        }
        dcp.load(found, checkpoint_id=folder / str(number))
        set_model_state_dict(models[1], found["model"])
        set_optimizer_state_dict(models[1], second, found["optim"])
        for model, optimizer in zip(models, (first, second), strict=True):
            train(model, optimizer, range(4, 9), part_of(rank))
        wanted = whole(models[0])
        assert all(torch.equal(value, wanted[name]) for name, value in whole(models[1]).items()), options


def every_random_choice_is_the_same(rank: int, folder: Path) -> None:
    for projector in ("gaussian", "orthonormal", "coordinates", "sampled", "randomized"):
        model = network()
        torch.manual_seed(rank)  # the global generators differ
        optimizer = optimizer_of(model, projector=projector)
        train(model, optimizer, range(1), slice(None))
        for value in optimizer.state[model[3].weight].values():
            both = [torch.empty_like(value) for _ in range(PROCESSES)]
            dist.all_gather(both, value.contiguous())
            assert torch.equal(*both), projector


CHECKS: list[Callable[[int, Path], None]] = [
    data_parallel_steps_are_those_of_one_process,
    fully_sharded_steps_are_those_of_one_process,
    named_optimizers_take_the_steps_of_one_process,
    moments_and_bases_are_shards,
    half_precision_weights_keep_a_sharded_copy,
    stochastic_rounding_differs_between_shards,
    steps_in_backward_are_those_of_step,
    a_gradient_that_is_not_finite_in_one_process_is_refused_in_all,
    a_distributed_checkpoint_goes_on_bit_for_bit,
    every_random_choice_is_the_same,
]


def _enter(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    failures = {}
    for check in CHECKS:
        try:
            check(rank, folder)
            failures[check.__name__] = ""
        except Exception:
            failures[check.__name__] = traceback.format_exc()
        # At once, for a process that fails alone leaves the others waiting for it.
        (folder / f"{rank}.json").write_text(json.dumps(failures), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run every check in one group of processes, and return what failed in any of them."""
    folder = tmp_path_factory.mktemp("group")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])  # whence new processes import this file
        mp.spawn(_enter, args=(folder, port), nprocs=PROCESSES)
    found = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]
    return {name: "\n".join(filter(None, (each[name] for each in found))) for name in found[0]}


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_two_processes(check: str, failures: dict[str, str]) -> None:
    assert not failures[check], failures[check]
