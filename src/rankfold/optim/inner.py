"""What a projected optimizer does with a gradient in low-rank coordinates: a direction and its factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


class Inner:
    """An optimizer of one tensor, whose moments have the tensor's shape.

    `direction(gradient, state, step)` returns what is to be subtracted, without the learning rate and without
    a factor, and that factor, which corrects for moments that start at zero.
    """

    first: tuple[str, ...] = ()  # moments that are linear in the gradient
    second: tuple[str, ...] = ()  # moments that are quadratic in it

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, float]:
        """Return the direction, and the factor of the learning rate, in the step with this number from 1."""
        return gradient, 1.0

    def _moment(self, state: State, name: str, like: Tensor) -> Tensor:
        return state.setdefault(name, torch.zeros_like(like, memory_format=torch.contiguous_format))


@dataclass(frozen=True)
class Adam(Inner):
    """Adam: `m / (sqrt(v) + eps)`; the bias corrections are in the factor."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    first = ("exp_avg",)
    second = ("exp_avg_sq",)

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, float]:
        """Return the direction and sqrt(1 - b2^t) / (1 - b1^t)."""
        mean, square = self._moment(state, "exp_avg", gradient), self._moment(state, "exp_avg_sq", gradient)
        mean.lerp_(gradient, 1 - self.betas[0])
        square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        factor = (1 - self.betas[1] ** step) ** 0.5 / (1 - self.betas[0] ** step)
        return mean / square.sqrt().add_(self.eps), factor


@dataclass(frozen=True)
class Lion(Inner):
    """Lion: the sign of a mixture of momentum and gradient."""

    betas: tuple[float, float] = (0.9, 0.99)
    first = ("exp_avg",)

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, float]:
        """Return signs."""
        mean = self._moment(state, "exp_avg", gradient)
        signs = mean.lerp(gradient, 1 - self.betas[0]).sign_()
        mean.lerp_(gradient, 1 - self.betas[1])
        return signs, 1.0


@dataclass(frozen=True)
class Momentum(Inner):
    """Stochastic gradient descent with momentum; without, the gradient itself."""

    momentum: float = 0.9
    first = ("momentum_buffer",)

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, float]:
        """Return the buffer."""
        if not self.momentum:
            return gradient, 1.0
        return self._moment(state, "momentum_buffer", gradient).mul_(self.momentum).add_(gradient), 1.0


@dataclass(frozen=True)
class Adafactor(Inner):
    """Adafactor's normalised update: a factored second moment, clipped in its root mean square, no momentum.

    Args:
        decay: the second moment's decay in step t is 1 - t^decay.
        eps: added to squares.
        clip: largest root mean square of the update.
    """

    decay: float = -0.8
    eps: float = 1e-30
    clip: float = 1.0

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, float]:
        """Return the normalised gradient."""
        squares, share = gradient.square() + self.eps, step**self.decay
        if gradient.dim() == 2:
            rows = self._moment(state, "rows", squares[:, 0]).lerp_(squares.mean(1), share)
            columns = self._moment(state, "columns_mean", squares[0]).lerp_(squares.mean(0), share)
            scale = (rows / rows.mean())[:, None] * columns
        else:
            scale = self._moment(state, "squares", squares).lerp_(squares, share)
        update = gradient * scale.rsqrt()
        return update / (update.square().mean().sqrt() / self.clip).clamp_min(1.0), 1.0


INNERS: dict[str, type[Inner]] = {"adamw": Adam, "lion": Lion, "sgd": Momentum, "adafactor": Adafactor}
