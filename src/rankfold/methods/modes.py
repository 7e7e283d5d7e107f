"""Cutting the sides of a weight into the modes of a tensor network."""

from __future__ import annotations

import math


def modes_of(size: int, count: int) -> list[int]:
    """Return `count` factors of a size, as equal as its divisors allow.

    Example:
        >>> modes_of(60, 2), modes_of(64, 3), modes_of(7, 2)
        ([6, 10], [4, 4, 4], [1, 7])
    """
    if count == 1:
        return [size]
    root = round(size ** (1 / count))
    first = max(d for d in range(1, root + 1) if size % d == 0)
    return [first, *modes_of(size // first, count - 1)]


def prime_digits(size: int) -> list[int]:
    """Return the prime factors of a size, the largest first; [1] for 1."""
    digits, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            digits.append(divisor)
            size //= divisor
        divisor += 1
    return [size, *reversed(digits)] if size > 1 or not digits else digits[::-1]


def bonds(digits: list[int], rank: int) -> list[int]:
    """Return c_0 .. c_K: the rank, but never more than the digits on either side of a cut can hold."""
    cuts = range(len(digits) + 1)
    return [min(rank, math.prod(digits[:cut]), math.prod(digits[cut:])) for cut in cuts]
