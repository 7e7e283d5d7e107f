"""The rows that a matrix meets: tokens of a sequence, or patches under a kernel, without what is masked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import StructuredLayer
from ..weights import Convolution
from ..weights.kernels import at_least_float32


@dataclass(frozen=True)
class Rows:
    """Activations of one call of a layer, one row a token.

    Attributes:
        values: (n, width), float32 or better.
        samples: (n,), to which example of the batch each row belongs.
    """

    values: Tensor
    samples: Tensor


def inputs_of(layer: StructuredLayer, x: Tensor) -> Tensor:
    """Return what the matrix (out, in) of a layer meets, (batch, ..., in): of a convolution, patches."""
    return patches(layer.op, x) if isinstance(layer.op, Convolution) else x


def outputs_of(layer: StructuredLayer, y: Tensor) -> Tensor:
    """Return a layer's output with its channels last, (batch, ..., out)."""
    if not isinstance(layer.op, Convolution):
        return y
    return batched(layer.op, y).flatten(2).transpose(1, 2)


def batched(op: Convolution, x: Tensor) -> Tensor:
    """Return (batch, channels, *space), also of an input without a batch."""
    return x if x.dim() == len(op.window) + 2 else x[None]


def patches(op: Convolution, x: Tensor) -> Tensor:
    """Unfold x (batch, channels, *space) into (batch, positions, channels * window), padding included."""
    x = batched(op, x)
    mode = "constant" if op.padding_mode == "zeros" else op.padding_mode
    x = F.pad(x, op.flat_padding, mode=mode)
    for axis, (size, stride, step) in enumerate(zip(op.window, op.stride, op.dilation, strict=True), start=2):
        x = x.unfold(axis, (size - 1) * step + 1, stride)[..., ::step]
    space = len(op.window)
    x = x.movedim(1, space + 1)  # (batch, *positions, channels, *window)
    return x.flatten(space + 1).flatten(1, space)


def kept(lead: tuple[int, ...], mask: Tensor | None) -> Tensor | None:
    """Return which rows of activations (*lead, width) a mask (batch, tokens) keeps, shaped for them, or None.

    Activations that do not start with the mask's axes, in either order, such as pooled ones, are kept whole;
    those of which batch and tokens are one axis, in that order, are recognised by its length.
    """
    if mask is None:
        return None
    for laid in (mask, mask.T):
        if lead[:2] == tuple(laid.shape):
            return laid
    return mask.flatten() if lead == (mask.numel(),) else None


def count_rows(lead: tuple[int, ...], mask: Tensor | None) -> int:
    """Count the rows of activations (*lead, width) that a mask keeps."""
    keep = kept(lead, mask)
    if keep is None:
        return math.prod(lead)
    return int(keep.sum()) * math.prod(lead[keep.dim() :])


@torch.no_grad()
def rows(activations: Tensor, mask: Tensor | None) -> Rows:
    """Return the rows of activations (batch, ..., width) that a mask (batch, tokens) keeps."""
    activations = activations.detach().to(at_least_float32(activations))
    lead, width = tuple(activations.shape[:-1]) or (1,), activations.shape[-1]
    activations = activations.reshape(*lead, width)
    keep = kept(lead, mask)
    samples = torch.arange(lead[0], device=activations.device)
    if keep is None:
        return Rows(activations.reshape(-1, width), samples.repeat_interleave(math.prod(lead[1:])))
    assert mask is not None
    keep = keep.to(activations.device)
    examples = kept(lead, torch.arange(len(mask), device=keep.device)[:, None].expand(mask.shape))
    assert examples is not None  # laid out as the mask is
    samples = examples[keep]
    return Rows(
        activations[keep].reshape(-1, width), samples.repeat_interleave(math.prod(lead[keep.dim() :]))
    )


def looked_up(ids: Tensor, mask: Tensor | None) -> Rows:
    """Return the ids (batch, ...) that a mask (batch, tokens) keeps, as whole numbers (n, 1)."""
    keep = kept(tuple(ids.shape), mask)
    found = (ids if keep is None else ids[keep.to(ids.device)]).reshape(-1, 1)
    return Rows(found, found[:, 0])


def leading(layer: StructuredLayer, x: Tensor, y: Any) -> tuple[int, ...]:
    """Return the axes (batch, tokens, ...) over which a layer is applied, without unfolding anything."""
    if isinstance(layer.op, Convolution):
        y = batched(layer.op, y)
        return (y.shape[0], math.prod(y.shape[2:]))
    return tuple(x.shape) if layer.looked_up else tuple(x.shape[:-1]) or (1,)
