"""Workers agree now and then: at once (DiLoCo), or on the others' changes a round late (eager updates)."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.optim import OuterOptimizer, Processes, Together, rounds_end

Build = Callable[..., OuterOptimizer]
PAPERS: dict[str, Build] = {"diloco": rf.optim.diloco, "eager": rf.optim.eager_diloco}


def delayed(
    inner: Any, lr: float, *, every: int, momentum: float = 0.9, exchange: Any = None
) -> OuterOptimizer:
    def outer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr, momentum=momentum, nesterov=momentum > 0)

    return OuterOptimizer(inner, every, outer, "delayed", exchange)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_of(model: nn.Module, worker: int, step: int) -> Tensor:
    """Return the loss on a worker's batch of a task that all workers share."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    wanted = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3:].sum(1)], 1)
    return (model(x) - wanted).square().mean()


class Worker:
    """A model, its optimizer, and all changes of it, by round."""

    def __init__(
        self, number: int, build: Build, exchange: Any, data: int | None = None, **options: Any
    ) -> None:
        self.number, self.data = number, number if data is None else data
        self.model = network()
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.optimizer = build(inner, **{"lr": 0.7, "every": 5, **options}, exchange=exchange)
        self.steps = 0
        self.changes: list[Tensor] = []

    def inner_step(self) -> bool:
        self.optimizer.zero_grad()
        loss_of(self.model, self.data, self.steps).backward()
        self.steps += 1
        self.optimizer.inner.step()
        return self.optimizer.count()

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])


def step_all(workers: list[Worker]) -> bool:
    """Let all take a step, and say whether the round is over."""
    over = [worker.inner_step() for worker in workers]
    return all(over)


def simulated(count: int, build: Build, rounds: int, **options: Any) -> list[Worker]:
    exchange = Together(count)
    workers = [Worker(number, build, exchange, **options) for number in range(count)]
    for _ in range(rounds):
        starts = [worker.flat() for worker in workers]
        while not step_all(workers):
            pass
        for worker, start in zip(workers, starts, strict=True):
            worker.changes.append(start - worker.flat())
        rounds_end([worker.optimizer for worker in workers])
    return workers


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_diloco_is_nesterovs_step_along_the_mean_change(momentum: float) -> None:
    workers = simulated(3, rf.optim.diloco, 4, momentum=momentum)
    expected = torch.cat([p.detach().flatten() for p in network().parameters()])
    velocity = torch.zeros_like(expected)
    for changes in zip(*(worker.changes for worker in workers), strict=True):
        mean = torch.stack(changes).mean(0)
        velocity = momentum * velocity + mean
        expected = expected - 0.7 * (mean + momentum * velocity if momentum else mean)
    for worker in workers:
        torch.testing.assert_close(worker.flat(), expected)


def test_a_single_eager_worker_is_diloco() -> None:
    eager, plain = (simulated(1, build, 6)[0] for build in (rf.optim.eager_diloco, rf.optim.diloco))
    torch.testing.assert_close(eager.flat(), plain.flat(), atol=1e-12, rtol=0)
    late = simulated(1, delayed, 6)[0]
    assert not torch.allclose(late.flat(), plain.flat(), atol=1e-3)


def test_with_plain_sgd_outside_the_sum_of_eager_updates_telescopes() -> None:
    rounds, lr = 5, 0.5
    workers = simulated(3, rf.optim.eager_diloco, rounds, momentum=0.0, lr=lr)
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    means = [torch.stack(each).mean(0) for each in zip(*(w.changes for w in workers), strict=True)]
    for worker in workers:
        applied = sum(means[:-1]) + worker.changes[-1] / 3
        torch.testing.assert_close(start - worker.flat(), lr * applied)


def test_workers_with_equal_data_stay_equal_and_only_the_share_of_others_is_a_round_late() -> None:
    exchange = Together(2)
    twins = [
        Worker(number, rf.optim.eager_diloco, exchange, data=0, momentum=0.0, lr=1.0) for number in (0, 1)
    ]
    start = twins[0].flat()
    for _ in range(2):
        begins = twins[0].flat()
        while not step_all(twins):
            pass
        twins[0].changes.append(begins - twins[0].flat())
        rounds_end([worker.optimizer for worker in twins])
        assert torch.equal(twins[0].flat(), twins[1].flat())
    first, second = twins[0].changes
    torch.testing.assert_close(start - twins[0].flat(), first + second / 2)


def test_eager_workers_end_lower_than_naively_delayed_ones_and_diloco_not_higher() -> None:
    losses = {}
    for name, build in (*PAPERS.items(), ("delayed", delayed)):
        workers = simulated(4, build, 16, lr=0.5, every=4)
        average: Any = copy.deepcopy(workers[0].model)
        values = torch.stack([worker.flat() for worker in workers]).mean(0)
        nn.utils.vector_to_parameters(values, average.parameters())
        with torch.no_grad():
            losses[name] = sum(loss_of(average, 99, step).item() for step in range(8)) / 8
    assert losses["diloco"] < losses["delayed"], losses
    assert losses["eager"] < losses["delayed"], losses


@pytest.mark.parametrize("name", PAPERS)
def test_a_resumed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    def train(worker: Worker, steps: int) -> None:
        for _ in range(steps):
            worker.optimizer.zero_grad()
            loss_of(worker.model, 0, worker.steps).backward()
            worker.steps += 1
            worker.optimizer.step()

    whole, first, second = (Worker(0, PAPERS[name], Together(1), every=3) for _ in range(3))
    train(whole, 14)
    train(first, 7)
    torch.save([first.model.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
    model, optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.steps = 7
    train(second, 7)
    assert torch.equal(whole.flat(), second.flat())
    train(first, 7)  # waiting for what is under way has not changed the run
    assert torch.equal(whole.flat(), first.flat())


def test_a_state_of_other_rounds_is_refused_and_so_is_a_momentum_out_of_range() -> None:
    saved = Worker(0, rf.optim.diloco, Together(1), every=3).optimizer.state_dict()
    with pytest.raises(InvalidOption, match="saved with every 3, and here it is 4"):
        Worker(0, rf.optim.diloco, Together(1), every=4).optimizer.load_state_dict(saved)
    with pytest.raises(InvalidOption, match="saved with update 'synchronous', and here it is 'eager'"):
        Worker(0, rf.optim.eager_diloco, Together(1), every=3).optimizer.load_state_dict(saved)
    with pytest.raises(InvalidOption, match="saved with workers 1, and here it is 2"):
        Worker(0, rf.optim.diloco, Together(2), every=3).optimizer.load_state_dict(saved)
    with pytest.raises(InvalidOption, match=r"momentum in \[0, 1\), not 0.7 and 1.5"):
        rf.optim.diloco(torch.optim.SGD(network().parameters()), momentum=1.5)


def test_gradients_and_the_state_of_the_inner_optimizer_are_not_touched_by_the_outer_step() -> None:
    worker = Worker(0, rf.optim.diloco, Together(1))
    while not worker.inner_step():
        pass
    gradients = [p.grad for p in worker.model.parameters()]
    state = copy.deepcopy(worker.optimizer.inner.state_dict()["state"])
    rounds_end([worker.optimizer])
    for parameter, gradient in zip(worker.model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
    after = worker.optimizer.inner.state_dict()["state"]
    assert all(torch.equal(after[n][key], state[n][key]) for n in state for key in state[n])
    assert worker.optimizer.param_groups is worker.optimizer.inner.param_groups


def test_what_cannot_be_waited_for_is_refused() -> None:
    worker = Worker(0, rf.optim.diloco, Together(2))
    worker.optimizer.send()
    with pytest.raises(Incompatible, match="1 of 2 workers have sent their changes"):
        worker.optimizer.receive()
    with pytest.raises(Incompatible, match="average their models"), worker.optimizer.averaged():
        pass
    with pytest.raises(InvalidOption, match="a round has at least one step"):
        rf.optim.diloco(torch.optim.SGD(network().parameters()), every=0)


def test_an_exchange_is_consumed_a_round_after_it_was_started() -> None:
    log: list[str] = []

    class Logged:
        workers = 2

        def start(self, values: list[Tensor], turn: int) -> Callable[[], list[Tensor]]:
            log.append(f"start {turn}")

            def finish() -> list[Tensor]:
                log.append(f"finish {turn}")
                return values

            return finish

    worker = Worker(0, rf.optim.eager_diloco, Logged(), every=2)
    for step in range(6):
        loss_of(worker.model, 0, step).backward()
        worker.optimizer.step()
    assert log == ["start 1", "start 2", "finish 1", "start 3", "finish 2"]


# Two processes ------------------------------------------------------------------------------------------

PROCESSES = 2


def _enter(number: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=number, world_size=PROCESSES)
    try:
        found = {}
        for name, build in PAPERS.items():
            worker = Worker(number, build, None, every=3)
            assert isinstance(worker.optimizer.exchange, Processes)
            for step in range(12):
                worker.optimizer.zero_grad()
                loss_of(worker.model, number, step).backward()
                worker.optimizer.step()
            own = worker.flat()
            with worker.optimizer.averaged():
                found[f"{name} averaged"] = worker.flat()
            assert torch.equal(worker.flat(), own)
            found[name] = own
        torch.save(found, Path(folder) / f"{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_processes_do_what_workers_do_that_take_turns(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_enter, args=(port, str(tmp_path)), nprocs=PROCESSES)
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(PROCESSES)]
    for name, build in PAPERS.items():
        workers = simulated(PROCESSES, build, 4, every=3)
        for result, worker in zip(found, workers, strict=True):
            torch.testing.assert_close(result[name], worker.flat())
        mean = torch.stack([worker.flat() for worker in workers]).mean(0)
        torch.testing.assert_close(found[0][f"{name} averaged"], mean)
        assert torch.equal(found[0][f"{name} averaged"], found[1][f"{name} averaged"])
    assert torch.equal(found[0]["diloco"], found[1]["diloco"])
    assert not torch.equal(found[0]["eager"], found[1]["eager"])
