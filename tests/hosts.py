"""Small models that the battery adapts: one layer of every kind and shape, and a model of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf


@dataclass(frozen=True)
class Host:
    """A layer to adapt and an input for it.

    Attributes:
        name: what a check calls it; a method that refuses it says so by this name (`refuses`).
        kind: of the layer, as a structure's `layers` name it.
        layer: makes the layer.
        sample: makes an input.
        part: of the layer, where the weight is one of several.
        fill: changes the stored weight before it is adapted.
    """

    name: str
    kind: str
    layer: Callable[[], nn.Module]
    sample: Callable[[torch.Generator], Tensor]
    part: str = ""
    fill: Callable[[Tensor], Tensor] = lambda weight: weight

    @property
    def path(self) -> str:
        """Dotted name of the weight in the model."""
        return f"layer.{self.part}" if self.part else "layer"

    def model(self, dtype: torch.dtype = torch.float64) -> Single:
        """Return the model, with the same values every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Single(self.layer())
        weight = getattr(model.layer, "weight", None)
        if weight is not None:
            weight.data = self.fill(weight.data)
        return model.to(dtype).eval()

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the input, with the same values every time; it requires a gradient if it can."""
        x = self.sample(torch.Generator().manual_seed(1))
        return x.to(dtype).requires_grad_() if x.is_floating_point() else x


class Single(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Call the layer; attention attends to its own input."""
        if hasattr(self.layer, "in_proj_weight"):
            return self.layer(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
        return self.layer(x)  # type: ignore[no-any-return]


def normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """Return a maker of normal inputs."""
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def _linear(name: str, out: int, columns: int, fill: Callable[[Tensor], Tensor] = lambda w: w) -> Host:
    return Host(name, "linear", lambda: nn.Linear(columns, out), normal(2, 3, columns), fill=fill)


def _of_rank_two(weight: Tensor) -> Tensor:
    return weight[:, :2] @ weight[:2]


def _transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 8)  # type: ignore[no-any-return]


SHAPES = (
    _linear("square", 6, 6),
    _linear("wide", 4, 8),
    _linear("tall", 8, 4),
    _linear("odd", 5, 7),
    _linear("rank-deficient", 6, 8, _of_rank_two),
    _linear("all-zero", 6, 4, torch.zeros_like),
)
LARGE = Host("large", "linear", lambda: nn.Linear(48, 64), normal(256, 48))
KINDS = (
    Host("linear without bias", "linear", lambda: nn.Linear(6, 8, bias=False), normal(3, 6)),
    Host("transposed linear", "linear", _transposed, normal(3, 8)),
    Host(
        "embedding",
        "embedding",
        lambda: nn.Embedding(10, 6, padding_idx=0),
        lambda g: torch.randint(10, (2, 5), generator=g),
    ),
    Host("convolution 1d", "convolution", lambda: nn.Conv1d(4, 6, 3, padding="same"), normal(2, 4, 9)),
    Host("convolution 2d", "convolution", lambda: nn.Conv2d(4, 6, (3, 2), 2, 1), normal(2, 4, 6, 5)),
    Host("convolution 3d", "convolution", lambda: nn.Conv3d(2, 4, (1, 2, 3)), normal(1, 2, 3, 4, 4)),
    Host(
        "grouped convolution",
        "convolution",
        lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2, padding_mode="circular", padding=1),
        normal(2, 4, 6, 5),
    ),
    Host("pointwise convolution", "convolution", lambda: nn.Conv2d(4, 6, 1, bias=False), normal(2, 4, 3, 3)),
    Host("attention input", "attention", lambda: nn.MultiheadAttention(8, 2), normal(4, 2, 8), "in_proj"),
    Host("attention output", "attention", lambda: nn.MultiheadAttention(8, 2), normal(4, 2, 8), "out_proj"),
)

WIDTH, INNER, VOCABULARY, TOKENS = 8, 12, 10, 6


class Block(nn.Module):
    """A residual block with a square, a tall and a wide weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the next hidden states (batch, token, width)."""
        hidden = hidden + torch.tanh(self.attention(hidden))
        return hidden + self.down(F.gelu(self.up(hidden)))


class GatedFeedForward(nn.Module):
    """A gated feed-forward block with the usual names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER)
        self.down_proj, self.act_fn = nn.Linear(INNER, WIDTH, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, token, width)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class GatedBlock(nn.Module):
    """A residual block whose feed-forward part is a gated module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Linear(WIDTH, WIDTH), GatedFeedForward()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the next hidden states (batch, token, width)."""
        hidden = hidden + torch.tanh(self.attention(hidden))
        return hidden + self.mlp(hidden)  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """Token ids (batch, token) through an embedding and two blocks to logits (batch, token, 4).

    Args:
        gated: whether the feed-forward parts are gated modules.

    Attributes:
        reentrant: None computes plainly; otherwise blocks are checkpointed, in the reentrant way if true.
    """

    def __init__(self, *, gated: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        block = GatedBlock if gated else Block
        self.blocks = nn.ModuleList([block(), block()])
        self.lm_head = nn.Linear(WIDTH, 4)
        self.reentrant: bool | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits."""
        hidden = self.embed(input_ids)
        if self.reentrant and not hidden.requires_grad and torch.is_grad_enabled():
            hidden.requires_grad_()
        for block in self.blocks:
            if self.reentrant is None:
                hidden = block(hidden)
            else:
                hidden = rf.checkpoint(self, block, hidden, use_reentrant=self.reentrant)
        return self.lm_head(hidden)  # type: ignore[no-any-return]


def blocks(dtype: torch.dtype = torch.float32, *, gated: bool = False) -> Blocks:
    """Return the model of blocks, with the same values every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Blocks(gated=gated).to(dtype).eval()


def token_ids(seed: int = 0) -> Tensor:
    """Return ids (3, TOKENS); token 1 stands at different places in two rows and is missing in the third."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (3, TOKENS), generator=generator)
    ids[0, 1 + seed], ids[1, 4 - seed] = 1, 1
    return ids
