"""Questions asked of a matrix before it is decomposed, so that what is refused is named."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidOption, InvalidRank


def require_finite(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor whose entries are all finite.

    Raises:
        InvalidOption: an entry is NaN or infinite.
    """
    if not bool(tensor.isfinite().all()):
        raise InvalidOption(f"{name} of shape {tuple(tensor.shape)} holds NaN or infinite entries")
    return tensor


def require_matrix(tensor: Tensor, name: str) -> Tensor:
    """Return a finite matrix with at least one entry.

    Raises:
        InvalidOption: it has not two dimensions, is empty, or holds NaN or infinite entries.
    """
    if tensor.dim() != 2 or not tensor.numel():
        raise InvalidOption(f"{name} of shape {tuple(tensor.shape)} is not a matrix with entries")
    return require_finite(tensor, name)


def require_rank(rank: int, limit: int, of: str = "min(m, n)") -> int:
    """Return a rank that a matrix can have.

    Raises:
        InvalidRank: it is not in 1..limit.
    """
    if not 1 <= rank <= limit:
        raise InvalidRank(f"rank {rank} is not in 1..{of} = {limit}")
    return rank


def require_indices(indices: Tensor, size: int, name: str) -> Tensor:
    """Return different integer indices in 0..size - 1, at least one.

    Raises:
        InvalidOption: they are something else.
    """
    whole = indices.dim() == 1 and not (indices.is_floating_point() or indices.dtype == torch.bool)
    inside = whole and bool(((indices >= 0) & (indices < size)).all())
    if not inside or not len(indices) or len(indices.unique()) != len(indices):
        raise InvalidOption(f"{name} must be different indices in 0..{size - 1}, at least one")
    return indices


def exact_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that the tensors are computed in together: float32 or better."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def precise_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 where the device of the tensor has it, else float32."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def null_level(values: Tensor, size: int) -> Tensor:
    """Return the level under which singular values are rounding: size * eps * the largest one."""
    return values.amax(-1, keepdim=True) * (size * torch.finfo(values.dtype).eps)
