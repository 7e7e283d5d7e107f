"""Embeddings of the nodes of a graph by attention that knows how far nodes are from each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InvalidOption
from ..networks import FAR, KINDS, Graph

_DIMENSIONS = 4  # of a parameter's shape that are read
_DOUBLINGS = 24


class GraphEncoder(nn.Module):
    """Embeddings of kind, shape and degrees, then layers of attention and of a perceptron (Graphormer).

    Args:
        hidden: width, a multiple of heads.
        layers: of attention.
        heads: of attention.

    Raises:
        InvalidOption: the width is no multiple of the heads.
    """

    def __init__(self, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        if hidden % heads:
            raise InvalidOption(f"logah: hidden must be a multiple of heads = {heads}, not {hidden}")
        self.kinds = nn.Embedding(len(KINDS), hidden)
        self.shapes = nn.ModuleList(nn.Embedding(_DOUBLINGS, hidden) for _ in range(_DIMENSIONS))
        self.degrees = nn.ModuleList(nn.Embedding(FAR + 1, hidden) for _ in range(2))
        self.layers = nn.ModuleList(_Layer(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, graph: Graph) -> Tensor:
        """Return the embeddings of the nodes, (n, hidden)."""
        device = self.norm.weight.device
        distances = graph.distances.to(device)
        x: Tensor = self.kinds(torch.tensor([KINDS.index(node.kind) for node in graph.nodes], device=device))
        sizes = torch.tensor([_sizes(node.shape) for node in graph.nodes], device=device)
        for column, embedding in zip(sizes.T, self.shapes, strict=True):
            x = x + embedding(column)
        for axis, embedding in enumerate(self.degrees):
            x = x + embedding((distances == 1).sum(axis).clamp(max=FAR))
        for layer in self.layers:
            x = layer(x, distances)
        found: Tensor = self.norm(x)
        return found


def _sizes(shape: tuple[int, ...]) -> list[int]:
    """Return the binary logarithm of every dimension, rounded, plus one; 0 where there is no dimension."""
    known = [1 + min(_DOUBLINGS - 2, round(math.log2(size))) for size in shape[:_DIMENSIONS]]
    return known + [0] * (_DIMENSIONS - len(known))


class _Layer(nn.Module):
    """Attention with a bias for the distance there and one for the way back, and a perceptron."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.joined, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.there, self.back = nn.Embedding(FAR + 1, heads), nn.Embedding(FAR + 1, heads)
        self.perceptron = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, x: Tensor, distances: Tensor) -> Tensor:
        bias = (self.there(distances) + self.back(distances.T)).permute(2, 0, 1)
        query, key, value = self.joined(self.first(x)).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(query[None], key[None], value[None], bias[None])[0]
        x = x + self.out(attended.transpose(0, 1).flatten(1))
        return x + self.perceptron(self.second(x))  # type: ignore[no-any-return]
