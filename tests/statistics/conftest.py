"""Small models whose statistics can be computed densely, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER, TOKENS = 6, 8, 5


class Block(nn.Module):
    """Three weights that share an input, one on their product, dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states (batch, token, width)."""
        scores = self.q(x) @ self.k(x).mT / WIDTH**0.5
        x = x + self.drop(scores.softmax(-1) @ self.v(x))
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks and a head; with labels (batch, token) it returns a loss too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        """Return logits and loss."""
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits, "loss": None}
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def make_net(dtype: torch.dtype = torch.float64) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype).train()


def make_batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Return batches with labels and padding, of different sizes."""
    generator, made = torch.Generator().manual_seed(1), []
    for size in range(2, 2 + count):
        x = torch.randn(size, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(3, (size, TOKENS), generator=generator)
        mask = torch.ones(size, TOKENS, dtype=torch.long)
        mask[0, 3:] = 0
        labels[mask == 0] = -100
        labels[1, 0] = -100
        made.append({"x": x, "labels": labels, "attention_mask": mask})
    return made


@pytest.fixture
def net() -> Net:
    return make_net()


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    return make_batches()


@pytest.fixture
def net_of() -> Callable[..., Net]:
    return make_net


@pytest.fixture
def batches_of() -> Callable[..., list[dict[str, Tensor]]]:
    return make_batches


@pytest.fixture
def inputs_of() -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """Record input and output of one layer, batch by batch."""

    def record(model: nn.Module, layer: nn.Module, batches: list[Any]) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        handle = layer.register_forward_hook(
            lambda module, args, out: found.append((args[0].detach(), out.detach()))
        )
        training = model.training
        model.eval()
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)
        model.train(training)
        handle.remove()
        return found

    return record
