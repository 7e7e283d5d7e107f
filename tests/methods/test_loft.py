"""LoFT: at full rank AdamW on the weight, whatever the factors are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import Host
from methods._dynamic import LAYERS, runs_on
from methods._layers import normal
from methods._moving import Training, assert_ends, assert_resumes, recipe
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.dynamics import loft as module
from rankfold.methods.dynamics.loft import Loft
from rankfold.methods.run import TrainedPair

SIZE = 6
X, Y = normal(20, SIZE, seed=5), normal(20, SIZE, seed=6)
AdamW = torch.optim.AdamW


class Square:
    """A product of two invertible factors, trained by LoFT in place of a weight that is zero."""

    def __init__(
        self,
        *,
        rank: int = SIZE,
        turn: Tensor | None = None,
        decay: float = 0.1,
        betas: Any = (0.9, 0.999),
        **options: Any,
    ) -> None:
        model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).double()
        model[0].weight.data.zero_()
        options = {"eps": None, "damping": 0.0, **options}
        self.model = rf.adapt(
            model, recipe("loft", ("lora", {"alpha": 9.0}), **options), rank=rank, targets="0"
        )
        groups = rf.param_groups(self.model, lr=0.01, weight_decay=decay)
        self.optimizer = AdamW(groups, betas=betas)
        self.handle = rf.attach(self.model, self.optimizer)
        turn = torch.eye(rank).double() if turn is None else turn
        identity = 3 * torch.eye(SIZE).double()  # rounding grows with the factors' condition
        self.pair.up.data = (normal(SIZE, SIZE) + identity)[:, :rank] @ turn
        self.pair.down.data = torch.linalg.solve(turn, (normal(SIZE, SIZE, seed=2) + identity)[:rank])

    @property
    def pair(self) -> TrainedPair:
        assert self.handle.run is not None
        return self.handle.run.pairs[0]

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        (self.model(X) - Y).square().mean().backward()
        self.optimizer.step()
        return self.pair.change()


def distance_to_adamw(
    square: Square, steps: int = 12, decay: float = 0.1, betas: Any = (0.9, 0.999)
) -> float:
    """Return how far the product is from a weight that AdamW trains, after so many steps."""
    weight = square.pair.change().requires_grad_()
    optimizer, distance = AdamW([weight], lr=0.01, weight_decay=decay, betas=betas), 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        (X @ weight.mT - Y).square().mean().backward()
        optimizer.step()
        distance = max(distance, float((square.step() - weight).detach().abs().max()))
    return distance


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_at_full_rank_it_is_adamw_on_the_weight(betas: tuple[float, float], decay: float) -> None:
    assert distance_to_adamw(Square(decay=decay, betas=betas), decay=decay, betas=betas) < 1e-12


def test_a_transposed_or_missing_transport_of_the_second_moment_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Loft, "turned", lambda self, square, turn: turn.mT @ square @ turn)
    assert distance_to_adamw(Square()) > 1e-3
    monkeypatch.setattr(Loft, "turned", lambda self, square, turn: square)
    assert distance_to_adamw(Square()) > 1e-3


@pytest.mark.parametrize("rank", [2, 3, SIZE])
def test_it_does_not_depend_on_which_factors_a_product_is_made_of(rank: int) -> None:
    turn = normal(rank, rank, seed=9) + 2 * torch.eye(rank)
    plain, turned = Square(rank=rank), Square(rank=rank, turn=turn)
    for _ in range(8):
        torch.testing.assert_close(plain.step(), turned.step(), rtol=1e-9, atol=1e-10)


def test_diagonal_second_moments_lose_the_exactness_and_still_train() -> None:
    assert 1e-4 < distance_to_adamw(Square(diagonal=True)) < 1
    training = Training(recipe("loft", diagonal=True), make=AdamW)
    assert training.run(40) < 0.8 * Training(recipe("loft", diagonal=True), make=AdamW).run(1)


@pytest.mark.parametrize("diagonal", [False, True])
def test_blocks_of_rows_make_the_same_step_as_the_whole_direction(
    diagonal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Training(recipe("loft", diagonal=diagonal), make=AdamW)
    whole.run(6)
    monkeypatch.setattr(module, "_BLOCK", 25)
    blocks = Training(recipe("loft", diagonal=diagonal), make=AdamW)
    blocks.run(6)
    torch.testing.assert_close(blocks.function(), whole.function(), rtol=1e-12, atol=1e-12)


def test_the_full_size_direction_is_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 64)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend([out.numel()] if isinstance(out, Tensor) else [])
            return out

    out, columns, rank = 64, 48, 2
    model = rf.adapt(nn.Sequential(nn.Linear(columns, out)), recipe("loft"), rank=rank, targets="0")
    optimizer = AdamW(rf.param_groups(model, lr=1e-2))
    with rf.attach(model, optimizer):
        for _ in range(2):
            model(torch.randn(4, columns)).square().mean().backward()
            with Watch():
                optimizer.step()
    assert 0 < max(sizes) <= rank**2 * out < out * columns


def test_b_moves_at_even_steps_and_a_at_odd_ones() -> None:
    training = Training(recipe("loft", init="pissa"), make=AdamW)
    for step in range(4):
        up, down = training.pair.up.detach().clone(), training.pair.down.detach().clone()
        training.run(1)
        assert torch.equal(training.pair.up, up) == (step % 2 == 1)
        assert torch.equal(training.pair.down, down) == (step % 2 == 0)


def test_a_step_moves_the_weight_by_the_projected_direction() -> None:
    square = Square(rank=2, decay=0.0)
    before, down = square.pair.change(), square.pair.down.detach().clone()
    weight = before.clone().requires_grad_()
    (X @ weight.mT - Y).square().mean().backward()
    assert weight.grad is not None
    project = torch.linalg.pinv(down) @ down
    gradient = weight.grad @ project
    direction = gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(square.step() - before, -0.01 * direction @ project)


def test_while_b_is_zero_the_state_of_a_is_zero() -> None:
    training = Training(recipe("loft"), make=AdamW)
    training.run(1)
    state = training.memory("loft")["down"]
    assert not state["mean"].any()
    assert not state["square"].any()
    training.run(1)
    assert training.memory("loft")["down"]["mean"].any()


def test_the_state_is_as_large_as_stated() -> None:
    for diagonal, each in ((False, 2 + 3), (True, 2 + 1)):
        training = Training(recipe("loft", diagonal=diagonal), rank=3, make=AdamW)
        training.run(2)
        memory = training.memory("loft")
        held = sum(value.numel() for side in ("up", "down") for value in memory[side].values())
        assert held == each * 3 * (12 + 10)
        assert training.pair.up not in training.optimizer.state


def test_the_eps_is_the_papers_unless_the_optimizers_is_asked_for() -> None:
    def moved(eps: float | None, own: float) -> Tensor:
        training = Training(recipe("loft", eps=eps), make=AdamW)
        for group in training.optimizer.param_groups:
            group["eps"] = own
        training.run(2)
        return training.function()

    assert torch.equal(moved(1e-4, 1e-8), moved(None, 1e-4))
    assert not torch.equal(moved(1e-4, 1e-8), moved(None, 1e-8))


@pytest.mark.parametrize("size", [0.01, 1e6])
def test_clipping_is_by_the_norm_of_the_projected_gradients_of_the_factors_that_move(size: float) -> None:
    training = Training(recipe("loft", init="pissa", max_norm=size, damping=0.0), make=AdamW)
    training.gradients()
    seen = {}
    for pair in training.started.pairs:
        assert pair.up.grad is not None
        down = pair.scale * pair.down.detach()
        seen[pair.key] = pair.up.grad @ torch.linalg.inv(down @ down.mT), down
    training.optimizer.step()
    norm = float(torch.stack([(g @ down).norm() for g, down in seen.values()]).norm())
    for key, (gradient, _) in seen.items():
        training.started.enter("loft")
        mean = training.started.memory(key)["up"]["mean"]
        torch.testing.assert_close(mean.mT, 0.1 * gradient * min(1.0, size / (norm + 1e-6)))


def test_it_falls_faster_than_lora_at_the_same_rate() -> None:
    plain = recipe("lora+", ratio=1.0)
    assert Training(recipe("loft"), make=AdamW).run(40) < Training(plain, make=AdamW).run(40)


@pytest.mark.parametrize("structure", ["lora", "dora"])
@pytest.mark.parametrize("diagonal", [False, True])
def test_training_resumes_bit_for_bit(structure: str, diagonal: bool, tmp_path: Path) -> None:
    assert_resumes(recipe("loft", structure, diagonal=diagonal), tmp_path, make=AdamW)


def test_what_was_trained_folds_and_is_taken_away() -> None:
    training = Training(recipe("loft"), make=AdamW)
    training.run(12)
    assert_ends(training)


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"max_norm": 0.0}, {"eps": -1.0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match=f"loft: {next(iter(options))} must be"):
        Loft(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", LAYERS, ids=lambda host: host.name)
def test_every_kind_of_layer_learns(host: Host) -> None:
    runs_on("lora/loft", host)
