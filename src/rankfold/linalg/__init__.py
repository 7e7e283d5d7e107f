"""Truncated decompositions; nothing of neural networks."""

from .svd import range_finder, truncated_svd

__all__ = ["range_finder", "truncated_svd"]
