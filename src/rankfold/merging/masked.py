"""A merged tensor as a function of a mask over the singular components of every task's change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .parts import Parts


@dataclass(frozen=True)
class Start:
    """Where the learning of masks and coefficients starts.

    Attributes:
        from_mean: the origin is the mean of the models, not the base.
        fraction: of the components, the leading ones, that are on.
        coefficient: of every task, times its weight.
        margin: distance of every logit from 0.
        temperature: of the logits.
    """

    from_mean: bool
    fraction: float
    coefficient: float
    margin: float
    temperature: float

    def origin(self, parts: Parts) -> Tensor:
        """Return th_o."""
        return torch.stack(parts.models).mean(0) if self.from_mean else parts.origin

    def coefficients(self, parts: Parts) -> Tensor:
        """Return l (T,)."""
        return (self.coefficient * parts.spread().flatten()).requires_grad_()

    def logits(self, values: Tensor) -> Tensor:
        """Return a (T, k) for singular values (T, k)."""
        kept = torch.arange(values.shape[1], device=values.device) < int(self.fraction * values.shape[1])
        signs = torch.where(kept, self.margin, -self.margin).to(values.dtype)
        return signs.expand_as(values).clone().requires_grad_()


class Added:
    """th_o + sum_t l_t (th_t - th_o).

    Args:
        parts: one tensor of all models.
        start: of the coefficients.
    """

    def __init__(self, parts: Parts, start: Start) -> None:
        self.origin, self.coefficients = start.origin(parts), start.coefficients(parts)
        self.changes = torch.stack(parts.models) - self.origin

    def tensor(self) -> Tensor:
        """Return th*, which carries the gradients of what is learned."""
        merged: Tensor = self.origin + torch.tensordot(self.coefficients, self.changes, 1)
        return merged


class Masked:
    """th_o + sum_t l_t U_t diag(h_t s_t) V_t^T, with the gradient of h_t = sigmoid(a_t / temperature).

    Args:
        parts: one matrix of all models.
        start: of logits and coefficients.

    Attributes:
        logits: a (T, k); a component is on where its logit is above 0.
    """

    def __init__(self, parts: Parts, start: Start) -> None:
        self.origin, self.coefficients = start.origin(parts), start.coefficients(parts)
        changes = torch.stack(parts.models) - self.origin
        left, self.values, right = torch.linalg.svd(changes, full_matrices=False)
        self.left = torch.cat([*left], 1)  # (m, T k)
        self.right = right.flatten(0, 1)  # (T k, n)
        self.logits, self.temperature = start.logits(self.values), start.temperature

    def tensor(self) -> Tensor:
        """Return th*, which carries the gradients of what is learned."""
        soft = (self.logits / self.temperature).sigmoid()
        hard = (self.logits > 0).to(soft.dtype)
        straight_through = soft * self.values + ((hard - soft) * self.values).detach()
        kept = self.coefficients[:, None] * straight_through
        merged: Tensor = self.origin + self.left * kept.flatten() @ self.right
        return merged
