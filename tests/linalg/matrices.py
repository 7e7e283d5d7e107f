"""Matrices of known spectrum, float64."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectral(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """Return a matrix with these singular values and random singular vectors."""
    left = torch.linalg.qr(normal(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(normal(columns, len(values), seed=seed + 1000)).Q
    return left * values @ right.T


def gram(size: int, rank: int, seed: int = 0) -> Tensor:
    inputs = normal(rank, size, seed=seed)
    return inputs.T @ inputs / max(rank, 1)


sizes = st.integers(1, 9)
seeds = st.integers(0, 999)
