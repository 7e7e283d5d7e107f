"""Norms with one gain in the place of norms with a gain for each channel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_NORM = re.compile(r"(RMS|Layer)Norm$")


class SingleScaleNorm(nn.Module):
    """Divides by the root mean square and multiplies by one trained number.

    Args:
        width: length of the last axis.
        eps: added to the mean square.
        gain: gamma at the start.
        like: dtype and device of gamma.
        stock: the norm that this one stands for, if any.
    """

    def __init__(
        self, width: int, eps: float, gain: float, like: Tensor, stock: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.width, self.eps, self._stock = width, eps, (stock,)
        self.weight = nn.Parameter(torch.full((1,), gain, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """Return gamma x / sqrt(mean(x^2) + eps), with the mean in float32 or better."""
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the width."""
        return f"{self.width}, eps={self.eps}"

    @torch.no_grad()
    def stock(self) -> nn.Module:
        """Return a norm with a gain per channel, all of them gamma, that does the same."""
        norm = self._stock[0]
        if norm is None or _centres(norm):
            norm = nn.RMSNorm(self.width, self.eps)
        weight: Any = norm.to(self.weight).weight
        weight.add_(self.weight - _gains(norm).to(weight))
        return norm


def single_scale_norms(model: nn.Module) -> nn.Module:
    """Replace every norm with a gain per channel by one with one gain, the mean of theirs, in place.

    Example:
        >>> single_scale_norms(nn.Sequential(nn.LayerNorm(4)))
        Sequential(
          (0): SingleScaleNorm(4, eps=1e-05)
        )
    """
    made: dict[int, nn.Module] = {}
    for parent, name, norm in list(_norms(model)):
        weight: Any = norm.weight
        gain = float(_gains(norm).mean())
        new = SingleScaleNorm(len(weight), _eps(norm), gain, weight, norm)
        setattr(parent, name, made.setdefault(id(norm), new.train(norm.training)))
    return model


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield every norm with a gain per channel, with where it stands."""
    for parent in model.modules():
        for name, child in parent.named_children():
            weight = getattr(child, "weight", None)
            if _NORM.search(type(child).__name__) and isinstance(weight, Tensor) and weight.dim() == 1:
                yield parent, name, child


def _eps(norm: Any) -> float:
    found = next((getattr(norm, k) for k in ("eps", "variance_epsilon") if hasattr(norm, k)), None)
    return torch.finfo(norm.weight.dtype).eps if found is None else float(found)


def _centres(norm: nn.Module) -> bool:
    weight: Any = norm.weight
    return float((norm(torch.ones_like(weight)) - norm(-torch.ones_like(weight))).abs().max()) < 1e-3


@torch.no_grad()
def _gains(norm: nn.Module) -> Tensor:
    """Return what a norm multiplies each channel by, also where its stored gains are counted from 1."""
    probe = _centred(norm.weight)  # type: ignore[arg-type]
    odd: Tensor = (norm(probe) - norm(-probe)) / 2
    return odd * (probe.square().mean() + _eps(norm)).sqrt() / probe


def _centred(like: Tensor) -> Tensor:
    """Return a vector without zeros whose mean is zero, so that centring leaves it alone."""
    vector = torch.ones_like(like, requires_grad=False)
    vector[1::2] = -1
    if len(vector) % 2 and len(vector) > 1:
        vector[-3:] = vector.new_tensor([1.0, 1.0, -2.0])
    return vector
