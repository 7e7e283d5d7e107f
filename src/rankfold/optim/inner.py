"""What a projected optimizer does with a gradient in low-rank coordinates: a direction and its factor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import MissingDependency

State = dict[str, Tensor]


class Inner:
    """An optimizer of one tensor, whose moments have the tensor's shape.

    `direction(gradient, state, step)` returns what is to be subtracted, without the learning rate and without
    a factor, and that factor, which corrects for moments that start at zero.
    """

    columnwise: ClassVar[bool] = (
        False  # columns of a gradient do not meet, nor in moments, which have its shape
    )
    first: tuple[str, ...] = ()  # moments that are linear in the gradient
    second: tuple[str, ...] = ()  # moments that are quadratic in it

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, float]:
        """Return the direction, and the factor of the learning rate, in the step with this number from 1."""
        return gradient, 1.0

    def forget(self, state: State) -> None:
        """Set the moments to zero."""
        for name in self.first + self.second:
            if name in state:
                state[name].zero_()

    def turn(self, state: State, turn: Tensor) -> None:
        """Let the moments follow a new basis.

        Args:
            state: of a weight.
            turn: T = P_new^T P_old (r, r): first moments become T M, second ones T^2 M, entry by entry.
        """
        for power, names in ((1, self.first), (2, self.second)):
            for name in names:
                if name in state:
                    state[name] = turn**power @ state[name]

    def _moment(self, state: State, name: str, like: Tensor) -> Tensor:
        return state.setdefault(name, torch.zeros_like(like, memory_format=torch.contiguous_format))


@dataclass(frozen=True)
class Adam(Inner):
    """Adam: `m / (sqrt(v) + eps)`; the bias corrections are in the factor."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    columnwise = True
    first = ("exp_avg",)
    second = ("exp_avg_sq",)

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, float]:
        """Return the direction and sqrt(1 - b2^t) / (1 - b1^t)."""
        mean, square = self._moment(state, "exp_avg", gradient), self._moment(state, "exp_avg_sq", gradient)
        return _adam(mean, square, gradient, self.betas, self.eps), _correction(self.betas, step)


def _adam(mean: Tensor, square: Tensor, gradient: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Move both moments in place, and return the direction."""
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    return mean / square.sqrt().add_(eps)


def _correction(betas: tuple[float, float], step: int) -> float:
    return float((1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step))


@dataclass(frozen=True)
class Adam8bit(Inner):
    """Adam whose moments are kept in 8 bits, each block of entries with a scale of its own, through torchao.

    A moment of n entries takes n (1 + 4 / block) bytes. Those with few entries, or with a number of them that
    blocks do not divide, stay float32, as in torchao. Every step computes in float32, and the state holds the
    codes (uint8, of the moment's shape) and the scales (float32, one a block), plain tensors that load
    without torchao (Dettmers et al. 2022).

    Args:
        betas: decays of the moments.
        eps: added to the root of the second one.
        block: entries that share a scale.
        least: entries that a moment must have to be kept in 8 bits.

    Raises:
        MissingDependency: torchao is not installed.

    Example:
        >>> Adam8bit().bytes_of(128 * 1024), 2 * 128 * 1024 * 4
        (266240, 1048576)
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    block: int = 256
    least: int = 4096
    columnwise = False
    first = ("exp_avg",)
    second = ("exp_avg_sq",)

    def __post_init__(self) -> None:
        _eight_bit_state()

    def bytes_of(self, entries: int) -> int:
        """Return how many bytes both moments of so many entries take."""
        return 2 * (entries + 4 * (entries // self.block)) if self._is_quantised(entries) else 8 * entries

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, float]:
        """Return the direction, of moments before they are rounded, and its factor."""
        mean, square = (self._read(state, name, gradient) for name in ("exp_avg", "exp_avg_sq"))
        moved = _adam(mean, square, gradient, self.betas, self.eps)
        self._write(state, "exp_avg", mean)
        self._write(state, "exp_avg_sq", square)
        return moved, _correction(self.betas, step)

    def forget(self, state: State) -> None:
        """Set the moments to zero, which is what a scale of zero says."""
        super().forget(state)
        for name in self.first + self.second:
            if f"{name}.scale" in state:
                state[f"{name}.scale"].zero_()

    def turn(self, state: State, turn: Tensor) -> None:
        """Let the moments follow a new basis."""
        super().turn(state, turn)
        for power, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            if f"{name}.codes" in state:
                self._write(state, name, turn**power @ self._read(state, name, turn))

    def _is_quantised(self, entries: int) -> bool:
        return entries >= self.least and entries % self.block == 0

    def _read(self, state: State, name: str, like: Tensor) -> Tensor:
        codes = state.get(f"{name}.codes")
        if codes is not None:
            kept = _as_torchao(codes, state[f"{name}.scale"], name in self.first)
            return kept.dequantize(like.dtype)  # type: ignore[no-any-return]
        if name in state:
            return state[name]
        return torch.zeros_like(like, memory_format=torch.contiguous_format)

    def _write(self, state: State, name: str, value: Tensor) -> None:
        if not self._is_quantised(value.numel()):
            state[name] = value
            return
        if f"{name}.codes" not in state:
            state[f"{name}.codes"] = torch.zeros_like(value, dtype=torch.uint8)
            state[f"{name}.scale"] = value.new_zeros(value.numel() // self.block, dtype=torch.float32)
        kept = _as_torchao(state[f"{name}.codes"], state[f"{name}.scale"], name in self.first)
        kept.copy_(value.float().contiguous())


@cache
def _eight_bit_state() -> Any:
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise MissingDependency(
            "moments in 8 bits need torchao: install it with pip install 'rankfold[quant]'"
        ) from error
    return OptimState8bit


@cache
def _values(signed: bool, device: torch.device) -> Tensor:
    """Return what the 256 codes stand for."""
    values: Tensor = _eight_bit_state().zeros((1,), signed=signed, block_size=1, device=device).qmap
    return values


def _as_torchao(codes: Tensor, scale: Tensor, signed: bool) -> Any:
    """Return torchao's tensor over these codes and scales, which it shares."""
    return _eight_bit_state()(codes, scale, _values(signed, codes.device), signed)


@dataclass(frozen=True)
class Lion(Inner):
    """Lion: the sign of a mixture of momentum and gradient."""

    betas: tuple[float, float] = (0.9, 0.99)
    columnwise = True
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
    columnwise = True
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
    columnwise = False

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


INNERS: dict[str, type[Inner]] = {
    "adamw": Adam,
    "adamw8bit": Adam8bit,
    "lion": Lion,
    "sgd": Momentum,
    "adafactor": Adafactor,
}
