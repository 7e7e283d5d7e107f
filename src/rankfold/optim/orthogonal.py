"""Matrices moved by their orthogonalised momentum, and the iteration that orthogonalises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import InvalidOption
from .inner import Adam
from .matrices import Work, floating, matrix_shape, named
from .refusals import require_gradients, require_shape
from .state import keep_precision

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Moves groups whose `orthogonal` is true by Muon and the others by AdamW.

        M <- mu M + G,   W <- W - lr (0.2 sqrt(max(out, in)) orthogonalised(G + mu M) + weight_decay W)

    Args:
        params: groups.
        lr: learning rate, at least 0.
        momentum: mu, in [0, 1).
        weight_decay: decoupled, at least 0.
        iterations: of Newton and Schulz.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        InvalidOption: an option is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 5e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        iterations: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if not (0 <= momentum < 1 and iterations >= 1 and lr >= 0 and weight_decay >= 0):
            raise InvalidOption(
                "muon: momentum must be in [0, 1), lr and weight_decay at least 0 and iterations at least 1, "
                f"not {momentum}, {lr}, {weight_decay} and {iterations}"
            )
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(params, {**numbers, "betas": betas, "eps": eps, "orthogonal": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            InvalidOption: a gradient is sparse or not finite, or a weight has another shape than its state;
                nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            Work(group, name, parameter, parameter.grad)
            for index, group in enumerate(self.param_groups)
            for name, parameter in named(index, group)
            if parameter.grad is not None
        ]
        for each in work:
            for moment in self._moments(each.parameter):
                require_shape(each, moment.shape)
        require_gradients([replace(each, gradient=_local(each.gradient)) for each in work])
        for each in work:
            self._move(each.group, each.parameter, floating(each.gradient))
        return loss

    def _move(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        if group["orthogonal"]:
            momentum = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
            momentum.mul_(group["momentum"]).add_(gradient)
            direction = _orthogonal(gradient + group["momentum"] * momentum, group["iterations"])
            factor = 0.2 * max(matrix_shape(parameter)) ** 0.5
        else:
            step = state.setdefault("step", torch.zeros((), dtype=torch.int64)).add_(1)
            inner = Adam(group["betas"], group["eps"] * (1 - group["betas"][1] ** int(step)) ** 0.5)
            direction, factor = inner.direction(gradient, state, int(step))
        base = floating(parameter)  # half precision is rounded once, or the decay would be lost
        base.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"] * factor)
        if base is not parameter:
            parameter.copy_(base)

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        state = self.state.get(parameter, {})
        return [state[name] for name in ("momentum_buffer", "exp_avg", "exp_avg_sq") if name in state]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; moments keep their own precision, whatever that of the weights.

        Raises:
            ValueError: the groups differ.
        """
        super().load_state_dict(state_dict)
        keep_precision(self, state_dict)


def _local(gradient: Any) -> Tensor:
    """Return the entries that are in this process."""
    return gradient.to_local() if hasattr(gradient, "device_mesh") else gradient  # type: ignore[no-any-return]


def _orthogonal(update: Any, iterations: int) -> Tensor:
    """Orthogonalise a matrix; where it is spread over processes, each computes all and keeps its part."""
    if not hasattr(update, "device_mesh"):
        return orthogonalised(update, iterations)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, whole = update.device_mesh, orthogonalised(update.full_tensor(), iterations)
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, update.placements)


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return a matrix with the singular vectors of the given one and singular values near 1.

        X = N / |N|,   X <- 3.4445 X + (-4.7750 Z + 2.0315 Z Z) X with Z = X X^T

    Args:
        matrix: (out, ...), taken as (out, in); a vector is one column.
        iterations: five bring singular values above a hundredth of the norm into about [0.68, 1.13].

    Example:
        >>> orthogonalised(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    if matrix.dim() < 2:
        unit: Tensor = matrix / (matrix.norm() + 1e-8)
        return unit
    flat = matrix.reshape(len(matrix), -1)
    is_tall = flat.shape[0] > flat.shape[1]
    flat = flat.T if is_tall else flat
    flat = flat / (flat.norm() + 1e-8)
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(iterations):
        gram = flat @ flat.T
        flat = torch.addmm(flat, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), flat, beta=linear)
    return (flat.T if is_tall else flat).reshape(matrix.shape)
