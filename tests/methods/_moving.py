"""A small regression trained by dynamics that move the stored weights, stopped and continued."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from methods._layers import normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.methods.run import Run, TrainedPair

INPUTS, WANTED = normal(24, 12, seed=5), normal(24, 6, seed=6)


def perceptron(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model of two linear layers, with the same values every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)).to(dtype)


def recipe(name: str, structure: Any = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    """Return a point with one dynamics."""
    return rf.Recipe(structure, init, dynamics=((name, options),))


class Training:
    """A bare loop over one batch, with the dynamics attached."""

    def __init__(
        self,
        point: rf.Recipe | nn.Module,
        *,
        model: nn.Module | None = None,
        rank: int = 2,
        make: Callable[..., Any] = torch.optim.Adam,
        lr: float = 1e-2,
        total: int = 40,
        state: Any = None,
        inputs: Tensor = INPUTS,
        wanted: Tensor = WANTED,
        scheduler: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        fresh = isinstance(point, rf.Recipe)
        base = perceptron() if model is None else model
        self.model = rf.adapt(base, point, rank=rank, targets="all-linear", **options) if fresh else point
        self.optimizer = make(rf.param_groups(self.model, lr=lr))
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        if state is not None:
            self.optimizer.load_state_dict(state)
        self.handle = rf.attach(self.model, self.optimizer, total_steps=total, scheduler=self.scheduler)
        self.inputs, self.wanted = inputs, wanted

    @property
    def started(self) -> Run:
        """The training under way."""
        assert self.handle.run is not None
        return self.handle.run

    @property
    def pair(self) -> TrainedPair:
        """The first trained product."""
        return self.started.pairs[0]

    def memory(self, name: str) -> dict[str, Any]:
        """What a method remembers of the first product."""
        self.started.enter(name)
        return self.started.memory(self.pair.key)

    def gradients(self) -> float:
        """Compute gradients; return the loss."""
        self.optimizer.zero_grad()
        loss = (self.model(self.inputs) - self.wanted).square().mean()
        loss.backward()
        return float(loss.detach())

    def run(self, steps: int) -> float:
        """Take steps; return the last loss."""
        loss = float("nan")
        for _ in range(steps):
            loss = self.gradients()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        return loss

    def function(self) -> Tensor:
        """Return the outputs."""
        with torch.no_grad():
            return self.model(self.inputs)  # type: ignore[no-any-return]

    def moved(self) -> Tensor:
        """Return W - W0 of the first layer."""
        layer: Any = self.model[0]  # type: ignore[index]
        return (layer.expression.dense() - layer.matrix()).detach()  # type: ignore[no-any-return]


def event(training: Training, act: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Return the outputs before and after something that a method does."""
    before = training.function()
    with torch.no_grad():
        act()
    return before, training.function()


def dynamics_of(training: Training, name: str) -> Any:
    """Return a method with its memory in reach."""
    training.started.enter(name)
    return training.handle.methods[name]


def assert_resumes(
    point: rf.Recipe, folder: Path, *, stop: int = 17, total: int = 40, **options: Any
) -> None:
    """Training that is saved and continued is bit for bit training that was not interrupted."""
    whole = Training(point, total=total, **options)
    whole.run(stop)
    rf.save(whole.model, folder / "half")
    file = io.BytesIO()
    torch.save(whole.optimizer.state_dict(), file)
    whole.run(total - stop)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    loaded = rf.load(perceptron(), folder / "half")
    rest = {k: v for k, v in options.items() if k in ("make", "lr")}
    continued = Training(loaded, total=total, state=state, **rest)
    continued.run(total - stop)
    assert torch.equal(whole.function(), continued.function())


def assert_ends(training: Training) -> None:
    """Folding keeps the function, and removal brings the base back bit for bit."""
    applied, folded = training.function(), copy.deepcopy(training.model)
    rf.fold(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(training.inputs), applied)
    rf.remove(training.model)
    assert torch.equal(training.function(), perceptron()(INPUTS).detach())
