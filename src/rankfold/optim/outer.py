"""Workers that step alone for a while and then agree: the outer step, what is exchanged, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..errors import Incompatible, InvalidOption

UPDATES = ("synchronous", "eager", "delayed")


class Exchange(Protocol):
    """How workers average tensors."""

    workers: int

    def start(self, values: list[Tensor], turn: int) -> Callable[[], list[Tensor]]:
        """Start to average values with those of all workers in the round with this number.

        What is returned waits for the means and gives them.
        """


class Processes:
    """Averages over the processes of a group of torch.distributed, without waiting.

    Args:
        group: of processes; None means all.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.workers = dist.get_world_size(group) if dist.is_initialized() else 1

    def start(self, values: list[Tensor], turn: int) -> Callable[[], list[Tensor]]:
        """Start an asynchronous all-reduce of all values, in one buffer for each dtype."""
        if self.workers == 1:
            return lambda: values
        dtypes = dict.fromkeys(value.dtype for value in values)
        buffers = {d: torch.cat([v.flatten() for v in values if v.dtype == d]) for d in dtypes}
        work = [dist.all_reduce(flat, group=self.group, async_op=True) for flat in buffers.values()]

        def finish() -> list[Tensor]:
            for each in work:
                each.wait()
            return _parted(values, {dtype: flat / self.workers for dtype, flat in buffers.items()})

        return finish


def _parted(values: Sequence[Tensor], buffers: dict[torch.dtype, Tensor]) -> list[Tensor]:
    places = dict.fromkeys(buffers, 0)
    parts = []
    for value in values:
        start = places[value.dtype]
        places[value.dtype] += value.numel()
        parts.append(buffers[value.dtype][start : start + value.numel()].view_as(value))
    return parts


class Together:
    """Averages over workers that take turns in one process, each with a model of its own.

    Args:
        workers: how many.

    Example:
        >>> exchange = Together(2)
        >>> first = exchange.start([torch.tensor(1.0)], turn=1)
        >>> exchange.start([torch.tensor(3.0)], turn=1)()
        [tensor(2.)]
        >>> first()
        [tensor(2.)]
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._rounds: dict[int, list[list[Tensor]]] = {}

    def start(self, values: list[Tensor], turn: int) -> Callable[[], list[Tensor]]:
        """Add a worker's values to a round."""
        given = self._rounds.setdefault(turn, [])
        given.append(_copies(values))
        if len(given) == self.workers:
            del self._rounds[turn]

        def finish() -> list[Tensor]:
            if len(given) < self.workers:
                raise Incompatible(
                    f"{len(given)} of {self.workers} workers have sent their changes: let all of them call "
                    "`send()` before one calls `receive()`"
                )
            return [torch.stack(list(each)).mean(0) for each in zip(*given, strict=True)]

        return finish


class OuterOptimizer:
    """Lets an optimizer take `every` steps alone, then goes where an outer one goes from the round's start.

        Delta = theta(start of the round) - theta(end),   theta <- outer(theta(start), D)
        synchronous: D = mean Delta^t;   delayed: D = mean Delta^{t-1}
        eager: D = mean Delta^{t-1} + (Delta^t - Delta^{t-1}) / workers

    It is called in the place of the inner optimizer, which a scheduler of rates is given. Workers of the
    eager and the delayed update differ between rounds; what is evaluated is their average, see `averaged`.

    Args:
        inner: the optimizer of this worker.
        every: H, steps of a round, at least 1.
        outer: makes the outer optimizer from the parameters.
        update: synchronous, eager or delayed.
        exchange: with the other workers; None means all processes of torch.distributed.

    Raises:
        InvalidOption: an option is impossible.
    """

    def __init__(
        self,
        inner: Optimizer,
        every: int,
        outer: Callable[[list[Tensor]], Optimizer],
        update: str = "synchronous",
        exchange: Exchange | None = None,
    ) -> None:
        if every < 1 or update not in UPDATES:
            raise InvalidOption(
                f"a round has at least one step, and an update is one of {', '.join(UPDATES)}, not {every} "
                f"and {update!r}"
            )
        self.inner, self.every, self.update = inner, every, update
        self.exchange = exchange if exchange is not None else Processes()
        self.parameters = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
        self.outer = outer(self.parameters)
        self.steps = 0
        self._start = _copies(self.parameters)
        self._last = [torch.zeros_like(value) for value in self._start]
        self._pending: Callable[[], list[Tensor]] = lambda: [torch.zeros_like(v) for v in self._start]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take an inner step, and after every round an outer one."""
        loss: Any = self.inner.step(closure)
        if self.count():
            self.send()
            self.receive()
        return loss

    def count(self) -> bool:
        """Count an inner step that was taken by hand, and say whether the round is over."""
        self.steps += 1
        return self.steps % self.every == 0

    @torch.no_grad()
    def send(self) -> None:
        """Start to average this round's change with the other workers."""
        self._change = [s - p for s, p in zip(self._start, self.parameters, strict=True)]
        self._sent = self.exchange.start(self._change, self.steps // self.every)

    @torch.no_grad()
    def receive(self) -> None:
        """Take the outer step, and start the next round from there.

        Raises:
            Incompatible: another worker in this process has not sent its change.
        """
        change = self._sent() if self.update == "synchronous" else self._stale()
        gradients = [p.grad for p in self.parameters]
        for parameter, start, moved in zip(self.parameters, self._start, change, strict=True):
            parameter.copy_(start)
            parameter.grad = moved.to(parameter.dtype)
        self.outer.step()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._pending, self._last, self._start = self._sent, self._change, _copies(self.parameters)

    def _stale(self) -> list[Tensor]:
        means, workers = self._pending(), self.exchange.workers
        if self.update == "delayed":
            return means
        rounds = zip(means, self._change, self._last, strict=True)
        return [mean + (now - before) / workers for mean, now, before in rounds]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the average of all workers in the parameters for a while; every worker has to enter.

        Raises:
            Incompatible: the workers take turns in one process, where their models can be averaged directly.
        """
        if not isinstance(self.exchange, Processes):
            raise Incompatible("workers that take turns cannot wait for each other: average their models")
        own, means = _copies(self.parameters), self.exchange.start(_copies(self.parameters), -1)()
        _fill(self.parameters, means)
        try:
            yield
        finally:
            _fill(self.parameters, own)

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs, after waiting for what is under way; every worker saves its own."""
        means = self._pending() if self.update != "synchronous" else []
        if means:
            self._pending = lambda: means
        tensors = {"start": self._start, "last": self._last, "means": means}
        return {
            "inner": self.inner.state_dict(),
            "outer": self.outer.state_dict(),
            "steps": self.steps,
            **self._fixed(),
            **tensors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of this worker.

        Raises:
            InvalidOption: it was saved with rounds of another length, another update or number of workers.
        """
        for key, own in self._fixed().items():
            if state.get(key, own) != own:
                raise InvalidOption(f"the state was saved with {key} {state[key]!r}, and here it is {own!r}")
        self.inner.load_state_dict(state["inner"])
        self.outer.load_state_dict(state["outer"])
        self.steps = state["steps"]
        means, self._start, self._last = (
            [value.to(p) for value, p in zip(_copies(state[key]), self.parameters, strict=False)]
            for key in ("means", "start", "last")
        )
        self._pending = lambda: means

    def _fixed(self) -> dict[str, Any]:
        """Return what a state is only right with."""
        return {"every": self.every, "update": self.update, "workers": self.exchange.workers}


def rounds_end(workers: Sequence[OuterOptimizer]) -> None:
    """Let workers that take turns in one process end a round: all send, then all receive."""
    for worker in workers:
        worker.send()
    for worker in workers:
        worker.receive()


def _copies(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().clone() for value in values]


@torch.no_grad()
def _fill(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
