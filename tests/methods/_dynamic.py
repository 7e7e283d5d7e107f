"""Short trainings under dynamic rank rules, and what the tests of every such rule ask of them."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hosts import KINDS, Host
from methods._layers import normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.methods.attach import Attached
from rankfold.methods.run import Run, TrainedPair

PATHS = ("0", "2", "4")


def perceptron(widths: Sequence[int] = (8, 6, 8, 4)) -> nn.Module:
    """Return a network of linear layers in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for columns, out in itertools.pairwise(widths):
            layers += [nn.Linear(columns, out), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


class Training:
    """A training of an adapted model on a fixed regression.

    Args:
        recipe: a point, or an adapted model.
        total: steps of the whole training.
        rate: learning rate.
        state: of an optimizer, to go on from.
        arguments: of `adapt`.
    """

    def __init__(
        self, recipe: Any, total: int | None = 40, *, rate: float = 1e-2, state: Any = None, **arguments: Any
    ) -> None:
        arguments = {"rank": 2, "targets": list(PATHS), **arguments}
        self.model = recipe if isinstance(recipe, nn.Module) else rf.adapt(perceptron(), recipe, **arguments)
        self.optimizer = torch.optim.AdamW(rf.param_groups(self.model, lr=rate, weight_decay=0.01))
        if state is not None:
            self.optimizer.load_state_dict(state)
        self.handle: Attached = rf.attach(self.model, self.optimizer, total_steps=total)
        self.x, self.y = normal(32, 8), normal(32, 4, seed=2)

    @property
    def run(self) -> Run:
        """What the rule sees."""
        assert self.handle.run is not None
        self.handle.run.enter(next(iter(self.handle.methods)))
        return self.handle.run

    @property
    def pairs(self) -> list[TrainedPair]:
        """The gated products."""
        return self.run.pairs

    def backward(self) -> float:
        """Leave the loss's gradients."""
        self.optimizer.zero_grad()
        self.loss = (self.model(self.x) - self.y).square().mean()  # held over the next step, as loops do
        self.loss.backward()
        return float(self.loss.detach())

    def step(self, times: int = 1) -> float:
        """Take steps; return the last loss."""
        loss = 0.0
        for _ in range(times):
            loss = self.backward()
            self.optimizer.step()
        return loss

    def gates(self) -> list[Tensor]:
        """Return every gate's values."""
        return [pair.gate.detach().clone() for pair in self.pairs if pair.gate is not None]

    def open(self) -> int:
        """Count the gates that are not zero."""
        return sum(int((gate != 0).sum()) for gate in self.gates())

    def ranks(self) -> list[int]:
        """Return the number of terms of every product."""
        return [pair.rank for pair in self.pairs]

    def output(self) -> Tensor:
        """Return the model's output."""
        with torch.no_grad():
            output: Tensor = self.model(self.x)
        return output

    def state(self) -> Any:
        """Return the optimizer's state as a file would hold it."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def only_the_gates_move(training: Training) -> None:
    """At the start the output is the base's, and gates of zero keep the gradient from both factors."""
    assert torch.equal(training.output(), perceptron()(training.x))
    training.backward()
    for pair in training.pairs:
        assert pair.gate is not None
        assert pair.gate.grad is not None
        assert pair.gate.grad.abs().min() > 0
        assert pair.up.grad is not None
        assert not pair.up.grad.any()
        assert pair.down.grad is not None
        assert not pair.down.grad.any()


def moments(training: Training, parameter: Tensor) -> Tensor:
    """Return Adam's second moments."""
    return training.optimizer.state[parameter]["exp_avg_sq"].clone()


def resumes(
    recipe: Any, folder: Path, *, total: int = 40, at: Sequence[int] = (11, 30), **arguments: Any
) -> None:
    """A training that is stopped, saved and loaded ends as one that was not, bit for bit."""
    whole, halves = Training(recipe, total, **arguments), []
    for step in range(1, total + 1):
        whole.step()
        if step in at:
            rf.save(whole.model, folder / str(step))
            halves.append((step, whole.state()))
    for step, state in halves:
        again = Training(rf.load(perceptron(), folder / str(step)), total, state=state)
        again.step(total - step)
        assert again.ranks() == whole.ranks()
        assert torch.equal(again.output(), whole.output())
        assert all(map(torch.equal, again.gates(), whole.gates()))


def ends_the_same(recipe: Any, folder: Path, *, total: int = 40) -> Training:
    """Removing the handle changes no output, and files, summary and record have the ranks that are left."""
    training = Training(recipe, total)
    training.step(total)
    before = training.output()
    training.handle.remove()
    torch.testing.assert_close(training.output(), before, rtol=1e-12, atol=1e-12)
    rf.save(training.model, folder / "end")
    loaded = rf.load(perceptron(), folder / "end")
    with torch.no_grad():  # as `output` does; with gradients a product may be formed in another order
        assert torch.equal(loaded(training.x), training.output())
    record = loaded.__dict__["_rankfold"].adapter().record
    assert list(record["ranks"].values()) == training.ranks()
    rows = rf.summary(training.model).rows
    for row, pair in zip(rows, training.pairs, strict=True):
        assert f"gate*[{pair.rank}]" in row.formula
        assert row.trainable >= pair.rank * (sum(pair.expression.shape) + 1)
    folded = rf.fold(copy.deepcopy(training.model))
    torch.testing.assert_close(folded(training.x), training.output())
    return training


def ignores_skipped_steps(recipe: Any) -> None:
    """Steps that a gradient scaler skips are not counted and change nothing."""
    training = Training(recipe, 20)
    training.step(3)
    gates, memory = training.gates(), copy.deepcopy(training.run.state)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    training.optimizer.zero_grad()
    scaler.scale(training.model(training.x).sum() * float("inf")).backward()
    scaler.step(training.optimizer)
    assert training.run.step == 3
    assert all(map(torch.equal, gates, training.gates()))
    assert str(memory) == str(training.run.state)
    plain = Training(recipe, 20)
    plain.step(4)
    training.optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = (training.model(training.x) - training.y).square().mean()
    scaler.scale(loss).backward()
    scaler.step(training.optimizer)
    assert training.run.step == 4
    torch.testing.assert_close(training.output(), plain.output())


def runs_on(recipe: Any, host: Host) -> None:
    """A layer of any kind lowers its loss, and everything stays finite."""
    model = rf.adapt(host.model(), recipe, rank=2, targets=[host.path])
    x = host.input().detach()
    wanted = model(x).detach() + 0.1 * normal(*model(x).shape)
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=3e-2))
    losses = []
    with rf.attach(model, optimizer, total_steps=30):
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert min(losses[-5:]) < losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


LAYERS = [host for host in KINDS if "attention" not in host.name and "transposed" not in host.name]


def planted(recipe: Any, *, steps: int = 200, need: int = 4) -> Training:
    """Train at rank 2 where only the second of three equal layers has to change, by a matrix of that rank."""
    model = perceptron((12, 12, 12, 12))
    wanted: Any = copy.deepcopy(model)
    wanted[2].weight.data += 0.15 * normal(12, need, seed=5) @ normal(need, 12, seed=6)
    training = Training(rf.adapt(model, recipe, rank=2, targets=list(PATHS)), steps, rate=2e-2)
    training.x = normal(256, 12)
    training.y = wanted(training.x).detach()
    training.step(steps)
    return training
