"""Changes of kernels on a compact network that knows upright digits and learns turned ones."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf

METHODS = ("lora-c", "convlora", "cp-lora", "dora-c", "convdora", "cp-dora", "flora-tucker")
TRAINED = slice(0, 1200)
KEPT = slice(1200, None)


def digits(turned: bool) -> tuple[Tensor, Tensor]:
    """Return images (n, 1, 8, 8), on request turned by 45 degrees, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    if turned:
        half = math.sqrt(0.5)
        turn = torch.tensor([[half, -half, 0.0], [half, half, 0.0]]).expand(len(x), 2, 3)
        grid = nn.functional.affine_grid(turn, list(x.shape), align_corners=False)
        x = nn.functional.grid_sample(x, grid, align_corners=False)
    return x, torch.tensor(data.target)


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> None:
    """Train with Adam on random batches of 64."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A compact network trained on upright digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
    x, y = digits(turned=False)
    fit(model, x[TRAINED], y[TRAINED], 150, 1e-2)
    assert accuracy(model, x[KEPT], y[KEPT]) > 0.85
    return model


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_turned_digits_are_learned_by_the_kernels_alone(network: nn.Module, method: str) -> None:
    x, y = digits(turned=True)
    model = rf.adapt(copy.deepcopy(network), method, rank=4, targets="convolutions")
    before = accuracy(model, x[KEPT], y[KEPT])
    fit(model, x[TRAINED], y[TRAINED], 60, 1e-2)
    after = accuracy(model, x[KEPT], y[KEPT])
    assert after > before + 0.1, f"from {before} to {after}"
    wanted = model(x[:50])
    torch.testing.assert_close(rf.fold(model)(x[:50]), wanted, rtol=1e-4, atol=1e-4)
