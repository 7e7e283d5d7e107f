"""Refusing numbers that are none, before they enter a sum."""

from torch import Tensor

from ..errors import RankfoldError


class NotFinite(RankfoldError, ValueError):
    """A batch gives a loss, an activation or a gradient that is NaN or infinite."""


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise where a tensor holds a NaN or an infinity.

    Raises:
        NotFinite: it does; the sentence says what the tensor is.
    """
    # A finite sum has finite terms, and is read off faster; one that is not may have overflowed.
    if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
        raise NotFinite(f"{what} holds NaN or infinity")
