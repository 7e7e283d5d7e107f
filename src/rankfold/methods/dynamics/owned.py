"""What dynamics that take Adam's step themselves share: the optimizer's numbers and Gram matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import Incompatible
from ...optim import adam_options
from ...weights import Dropped, Weight
from ..limits import in_range
from ..run import Run, TrainedPair

EXCLUDED = (  # dynamics that act on the factors' own steps, of which there are none here
    "lora+", "allora", "relora", "periodic-lora", "switchlora", "refactorisation", "shrink-perturb",
    "shrink-perturb-all", "hd-pissa",
)  # fmt: skip


class Gram(NamedTuple):
    """The damped inverse of F^T F and its decomposition.

    Attributes:
        inverse: (r, r).
        values: eigenvalues of F^T F, (r,), ascending and not negative.
        vectors: its eigenvectors, (r, r), in columns.
    """

    inverse: Tensor
    values: Tensor
    vectors: Tensor


def gram(factor: Tensor, damping: float = 0.0) -> Gram:
    """Decompose F^T F and invert `F^T F + damping * (trace / r) I`; zeros have the inverse zero.

    Args:
        factor: F, (k, r), as `precise` returns it.
        damping: relative to the mean eigenvalue, at least 0.

    Example:
        >>> gram(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).inverse
        tensor([[0.2500, 0.0000],
                [0.0000, 0.0000]])
    """
    values, vectors = torch.linalg.eigh(factor.mT @ factor)
    values = values.clamp_min(0)
    least = len(values) * torch.finfo(values.dtype).eps * values.max()
    damped = values + damping * values.mean()
    inverse = torch.where(damped > least, 1 / damped, 0)
    return Gram((vectors * inverse) @ vectors.mT, values, vectors)


def precise(value: Tensor) -> Tensor:
    """Return a thin matrix in float64, or in float32 where the device has no float64."""
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)


def wide(value: Tensor) -> torch.dtype:
    """Return the dtype of full-size moments: the parameter's own, but at least float32."""
    return torch.promote_types(value.dtype, torch.float32)


@dataclass(frozen=True)
class Gradients:
    """A product with the gradients of its factors, in high precision.

    Attributes:
        up: B, (out, r).
        down: A, (r, in).
        to_up: gradient of B; that of the loss to be lowered, whatever the optimizer's `maximize`.
        to_down: gradient of A.
        scale: s.
    """

    up: Tensor
    down: Tensor
    to_up: Tensor
    to_down: Tensor
    scale: float


def gradients_of(run: Run, pair: TrainedPair) -> Gradients | None:
    """Return a product with its gradients, and keep them from the optimizer; None where there are none."""
    if pair.up.grad is None and pair.down.grad is None:
        return None
    sign = -1 if run.group(pair.up)["maximize"] else 1
    to_up, to_down = (torch.zeros_like(p) if p.grad is None else sign * p.grad for p in (pair.up, pair.down))
    pair.up.grad = pair.down.grad = None
    return Gradients(precise(pair.up), precise(pair.down), precise(to_up), precise(to_down), pair.scale)


def options(run: Run, parameter: Tensor) -> dict[str, Any]:
    """Return lr, betas, eps and weight decay of a parameter, which Adam or AdamW holds."""
    found = adam_options(run.optimizer, parameter)
    assert found is not None
    return {**found, "lr": float(found["lr"])}


def move(parameter: Tensor, step: Tensor, lr: float, weight_decay: float) -> None:
    """Take a step in the parameter's dtype: `p <- (1 - lr weight_decay) p - lr step`."""
    moved = precise(parameter) * (1 - lr * weight_decay) - lr * step
    parameter.copy_(moved)


def clip(norms: Iterable[Tensor], max_norm: float | None) -> float:
    """Return what gradients are multiplied by, given the norm of each, so that all of them have the most."""
    if max_norm is None:
        return 1.0
    total = float(torch.stack([norm.detach().cpu() for norm in norms] or [torch.zeros(())]).norm())
    return min(1.0, max_norm / (total + 1e-6))


def check_numbers(name: str, max_norm: float | None, /, **others: float | None) -> None:
    """Refuse a `max_norm` that is not positive and other options that are negative.

    Raises:
        InvalidOption: with the limits.
    """
    in_range(name, "(0, inf)", max_norm=max_norm)
    in_range(name, "[0, inf)", **others)


def check_run(name: str, run: Run) -> None:
    """Refuse amsgrad and decay through the gradient.

    Raises:
        Incompatible: with the reason.
    """
    for pair in run.pairs:
        group = run.group(pair.up)
        if group.get("amsgrad"):
            raise Incompatible(f"{name} keeps no maximum of second moments; use amsgrad=False")
        found = [options(run, factor) for factor in (pair.up, pair.down)]
        if any(numbers["weight_decay"] and not numbers["decoupled"] for numbers in found):
            raise Incompatible(
                f"{name} decays the factors themselves, not through their gradients; use torch.optim.AdamW "
                "or weight_decay=0"
            )


def refuse_dropout(
    name: str,
    path: str,
    expression: Weight,
    reason: str = "the gradients of both factors must come from the same input",
) -> None:
    """Refuse dropout on the input of a change.

    Raises:
        Incompatible: with the layer and the reason.
    """
    if any(isinstance(m, Dropped) and m.probability > 0 for m in expression.modules()):
        raise Incompatible(f"{path}: {name} works without dropout: {reason}; adapt with dropout=0")
