"""Layers whose output and whose gradients are multiplied by factors of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def scale_linear(layer: nn.Linear, scale: float) -> None:
    """Let a layer multiply its output by `scale`, and its gradients by factors of their own, from now on.

        y = scale W x,   dx = W^T dy / sqrt(in),   dW = dy^T x / sqrt(positions)

    Example:
        >>> layer = nn.Linear(4, 2, bias=False)
        >>> scale_linear(layer, 0.5)
        >>> torch.allclose(layer(torch.ones(1, 4)), 0.5 * layer.weight.sum(1))
        True
    """
    layer.unit_scale = scale  # type: ignore[assignment]
    layer.register_forward_pre_hook(_scale_gradient)
    layer.register_forward_hook(_scale_output)


def scale_embedding(layer: nn.Embedding) -> None:
    """Let an embedding multiply its table's gradient by sqrt(rows of the table / positions), from now on."""
    layer.register_forward_hook(_scale_table)


class _Scaled(torch.autograd.Function):
    """Multiplies a tensor by one factor, and its gradient by another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, forth: float, back: float) -> Tensor:
        ctx.back = back
        return value * forth

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.back, None, None


def _scaled(value: Tensor, forth: float, back: float) -> Tensor:
    result: Tensor = _Scaled.apply(value, forth, back)  # type: ignore[no-untyped-call]
    return result


def _rows(value: Tensor) -> int:
    return value.numel() // value.shape[-1]


def _scale_gradient(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Take back, on the way to the input, what the output's gradient is divided by for the weight's sake."""
    back = math.sqrt(_rows(inputs[0]) / layer.in_features)
    return (_scaled(inputs[0], 1.0, back), *inputs[1:])


def _scale_output(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return _scaled(output, layer.unit_scale, 1 / math.sqrt(_rows(output)))


def _scale_table(layer: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return _scaled(output, 1.0, math.sqrt(layer.num_embeddings / _rows(output)))
