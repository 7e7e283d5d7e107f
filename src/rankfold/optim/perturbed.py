"""Perturbed models in one forward pass: W x for all members, and a low-rank term for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible
from .noise import Noise

NORMS = (nn.LayerNorm, nn.RMSNorm)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, *NORMS)


class Perturbed:
    """Adds to what layers give what the perturbations of the members' weights would.

        y_i = W x_i +- sigma / sqrt(r) A_p (B_p^T x_i),   members 2p and 2p + 1 being + and -

    The members' inputs stand one behind the other along the first axis. No perturbation is formed.

    Args:
        noise: of the generation.
        sigma: size of perturbations.
        pairs: which pairs of members stand along the first axis.
        chosen: the parameters that are perturbed.
        met: where the names of parameters are noted that a layer used.
    """

    def __init__(
        self, noise: Noise, sigma: float, pairs: range, chosen: Iterable[Tensor], met: set[str]
    ) -> None:
        self.noise, self.sigma, self.pairs, self.met = noise, sigma, pairs, met
        self.chosen = {id(parameter) for parameter in chosen}

    def hook(self, path: str, layer: nn.Module) -> Callable[..., Tensor]:
        """Return the forward hook of a layer."""
        act = next(act for kinds, act in _ACTS if isinstance(layer, kinds))

        def perturb(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if len(inputs[0]) % (2 * len(self.pairs)):
                raise Incompatible(
                    f"{path}: {len(inputs[0])} rows cannot be shared by {2 * len(self.pairs)} members, whose "
                    "inputs have to stand one behind the other along the first axis; or freeze it"
                )
            return act(self, layer, inputs[0], output)

        return perturb

    def _is_chosen(self, parameter: Tensor | None) -> bool:
        if parameter is None or id(parameter) not in self.chosen:
            return False
        self.met.add(self.noise.names[id(parameter)])
        return True

    def _split(self, value: Tensor) -> Tensor:
        """Return (pairs, 2, rows of a member, ...)."""
        return value.reshape(len(self.pairs), 2, -1, *value.shape[1:])

    def _signed(self, low: Tensor, like: Tensor, scale: float) -> Tensor:
        """Return (pairs, 2, ...) as what is added to an output, with a member's sign."""
        signs = low.new_tensor([scale, -scale]).view(1, 2, *[1] * (low.dim() - 2))
        return (low * signs).reshape(like.shape)

    def _scale(self) -> float:
        return self.sigma / math.sqrt(self.noise.rank)

    def _add_vector(
        self, output: Tensor, vector: Tensor | None, axis: int, factor: Tensor | None = None
    ) -> Tensor:
        """Add a perturbed bias, or a perturbed gain times `factor`, along an axis of a member's output."""
        if not self._is_chosen(vector):
            return output
        drawn = self.noise.vector(vector, self.pairs)  # type: ignore[arg-type]
        shape = [len(drawn), 1, 1, *[1] * (output.dim() - 1)]
        shape[axis] = drawn.shape[1]
        spread = drawn.view(shape)
        low = (
            spread.expand(-1, 2, *self._split(output).shape[2:])
            if factor is None
            else spread * self._split(factor)
        )
        return output + self._signed(low, output, self.sigma)

    def _linear(self, layer: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        if self._is_chosen(layer.weight):
            left, right = self.noise.factors(layer.weight, self.pairs)
            flat = x.reshape(len(self.pairs), -1, x.shape[-1])
            low = torch.bmm(torch.bmm(flat, right), left.mT)
            low = low.view(len(self.pairs), 2, -1, low.shape[-1])
            output = output + self._signed(low, output, self._scale())
        return self._add_vector(output, layer.bias, -1)

    def _embedding(self, layer: nn.Embedding, ids: Tensor, output: Tensor) -> Tensor:
        if not self._is_chosen(layer.weight):
            return output
        left, right = self.noise.factors(layer.weight, self.pairs)
        rows = ids.reshape(len(self.pairs), -1, 1).expand(-1, -1, self.noise.rank)
        low = torch.bmm(left.gather(1, rows), right.mT).view(len(self.pairs), 2, -1, output.shape[-1])
        return output + self._signed(low, output, self._scale())

    def _convolution(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """Convolve each pair's inputs with its own r kernels, which are groups, and mix what they give."""
        if self._is_chosen(layer.weight):
            count, rank = len(self.pairs), self.noise.rank
            left, right = self.noise.factors(layer.weight, self.pairs)
            kernels = right.mT.reshape(count * rank, *layer.weight.shape[1:])
            beside = x.reshape(count, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
            bare = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            function: Any = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[x.dim() - 3]
            inner = function(beside, kernels, None, groups=count, **bare)
            inner = inner.view(len(inner), count, rank, -1).transpose(0, 1)
            low = torch.einsum("por,pnrs->pnos", left, inner).reshape(count, 2, -1, *output.shape[1:])
            output = output + self._signed(low, output, self._scale())
        return self._add_vector(output, layer.bias, 3)

    def _norm(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        if self._is_chosen(layer.weight):
            function: Any = (
                nn.functional.layer_norm if isinstance(layer, nn.LayerNorm) else nn.functional.rms_norm
            )
            output = self._add_vector(
                output, layer.weight, -1, function(x, layer.normalized_shape, eps=layer.eps)
            )
        return self._add_vector(output, getattr(layer, "bias", None), -1)


_ACTS: tuple[tuple[Any, Callable[..., Tensor]], ...] = (
    (nn.Linear, Perturbed._linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), Perturbed._convolution),
    (nn.Embedding, Perturbed._embedding),
    (NORMS, Perturbed._norm),
)


def perturbable(layer: nn.Module) -> bool:
    """Say whether a layer's parameters can be perturbed for many members at once.

    Example:
        >>> perturbable(nn.Linear(2, 2)), perturbable(nn.Conv2d(2, 2, 1, groups=2))
        (True, False)
    """
    if not isinstance(layer, LAYERS):
        return False
    plain = getattr(layer, "groups", 1) == 1 and getattr(layer, "padding_mode", "zeros") == "zeros"
    flat = not isinstance(layer, NORMS) or len(layer.normalized_shape) == 1
    return plain and flat
