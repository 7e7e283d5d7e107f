"""Weights in half precision: what becomes of steps that are smaller than half their spacing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidOption

ROUNDINGS = ("nearest", "stochastic", "master")
HALF = (torch.bfloat16, torch.float16)


def stochastically_rounded(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down at random, so that the mean is the value.

    Args:
        value: float32.
        dtype: bfloat16.
        generator: on the CPU.

    Raises:
        InvalidOption: the dtype is another.

    Example:
        >>> import torch
        >>> value = torch.full((4000,), 1 + 2**-9)
        >>> rounded = stochastically_rounded(value, torch.bfloat16, torch.Generator().manual_seed(0))
        >>> sorted(rounded.unique().tolist()), bool((rounded.float().mean() - value[0]).abs() < 1e-3)
        ([1.0, 1.0078125], True)
    """
    require_roundable(dtype)
    noise = torch.randint(1 << 16, value.shape, generator=generator, dtype=torch.int32).to(value.device)
    bits = (value.view(torch.int32) + noise) & -(1 << 16)
    return bits.view(torch.float32).to(dtype)


def require_roundable(dtype: torch.dtype) -> None:
    """Refuse a dtype that is not the upper half of float32."""
    if dtype != torch.bfloat16:
        raise InvalidOption(f"stochastic rounding is for bfloat16, not {dtype}; use rounding='master'")
