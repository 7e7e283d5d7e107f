"""How a matrix meets its input: as a linear map over the last axis, or as a convolution.

Every expression is a matrix of shape (out, in). For a convolution `in` counts channels times window, the
rightmost factor of a product is the kernel, and every other factor mixes channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Op:
    """The plain linear map `y = x @ matrix.T + bias` over the last axis."""

    groups = 1

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply a matrix (out, in) to x (..., in)."""
        return F.linear(x, matrix, bias)

    def low_rank(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Apply `up @ down`, up (out, r) and down (r, in), without forming the product."""
        return F.linear(F.linear(x, down), up)

    def channels(self, x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a linear map of channels, given as a function on (..., channels)."""
        return linear(x)

    def add(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Add one number per channel."""
        return y if bias is None else y + bias

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        """Multiply every channel by its own number."""
        return y * vector

    def tokens(self, x: Tensor) -> int:
        """How many columns the matrix is applied to."""
        return x.numel() // max(1, x.shape[-1])


LINEAR = Op()

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class Convolution(Op):
    """A convolution whose kernel is the matrix (out, in / groups * window) reshaped.

    Args:
        window: kernel size per spatial axis.
        stride, padding, dilation: per spatial axis, as in `torch.nn.Conv2d`.
        groups: number of channel groups.
        padding_mode: one of the modes of `torch.nn.Conv2d`; `flat_padding` is the amount for `F.pad`.
    """

    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"
    flat_padding: tuple[int, ...] = ()

    def _kernel(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.flat_padding, mode=self.padding_mode), (0,) * len(self.window)
        convolve = _CONVOLUTIONS[len(self.window)]
        return convolve(x, kernel, bias, self.stride, padding, self.dilation, self.groups)

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve x (batch, channels, *space) with the matrix seen as a kernel."""
        return self._kernel(x, matrix.reshape(matrix.shape[0], -1, *self.window), bias)

    def pointwise(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Mix channels, within each group, by a matrix (out, channels / groups)."""
        ones = (1,) * len(self.window)
        return _CONVOLUTIONS[len(self.window)](x, matrix.reshape(*matrix.shape, *ones), groups=self.groups)

    def low_rank(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Convolve to r channels with `down`, in every group, then mix them with `up`."""
        return self.pointwise(self.apply(x, down.repeat(self.groups, 1)), up)

    def channels(self, x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a linear map of channels, given as a function on (..., channels)."""
        return linear(x.movedim(1, -1)).movedim(-1, 1)

    def add(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Add one number per channel."""
        return y if bias is None else y + self._column(bias)

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        """Multiply every channel by its own number."""
        return y * self._column(vector)

    def tokens(self, x: Tensor) -> int:
        """How many positions the kernel is applied at, taking the input's own grid."""
        return x.numel() // max(1, x.shape[1])

    def _column(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * len(self.window))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product of `x` runs in: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
