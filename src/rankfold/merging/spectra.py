"""What the spectral rules of merging share: which tensors are matrices, and their singular components."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor

# Names of tables of embeddings: two axes, but a row is looked up and the matrix never meets an input.
EMBEDDINGS = ("*embed*", "*wte*", "*wpe*", "shared.weight")


def has_spectrum(name: str, shape: Sequence[int], plain: Sequence[str] = ()) -> bool:
    """Return whether a tensor is merged by its singular components.

    Args:
        name: of the tensor.
        shape: of the tensor; it needs two axes of more than one entry.
        plain: patterns of names, with `*` and `?`, of tensors that are merged entry by entry.

    Example:
        >>> has_spectrum("mlp.weight", (8, 4)), has_spectrum("mlp.bias", (8,))
        (True, False)
        >>> has_spectrum("tokens.embedding.weight", (8, 4), EMBEDDINGS)
        False
    """
    return len(shape) == 2 and min(shape) > 1 and not any(fnmatch(name, pattern) for pattern in plain)


def nonzero(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return which singular values (..., k) of matrices of that shape are no rounding errors.

    Example:
        >>> nonzero(torch.tensor([2.0, 1.0, 1e-9]), (3, 3))
        tensor([ True,  True, False])
    """
    return values > values[..., :1] * max(shape[-2:]) * torch.finfo(values.dtype).eps
