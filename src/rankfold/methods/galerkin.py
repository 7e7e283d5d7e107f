"""One step of a weight U S V^T along its manifold of low rank: what DLRT does around the optimizer's step.

    K = U S - lr G V,   L = S V^T - lr U^T G,   Uh = orth [K | U],   Vh = orth [L^T | V]
    Sh = Uh^T U S V^T Vh - lr Uh^T G Vh = P diag(d) Q^T,   U, S, V = Uh P, diag(d), Vh Q, cut to the new rank

Schotthoefer et al. 2022. Uh Sh Vh^T is W before the last step, so that all three gradients are of the same W
and one backward serves. Its (n, out) gradients of outputs and (n, in) inputs are held until the step for
Uh^T G Vh = (dy Uh)^T (x Vh); neither W nor G is formed, and S is never inverted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import Incompatible
from ..layers import StructuredLayer
from ..linalg.checks import exact_dtype, require_finite
from ..optim import transform
from ..weights import Leaf, Op, Spectral
from .importance import watch_gradients
from .limits import in_range
from .processes import average_gradients
from .rules import Dynamics
from .run import Run
from .spectra import drop_strange

LEAST = 2  # rank, in the official code


@dataclass(kw_only=True)
class Galerkin(Dynamics):
    """The basis-update and Galerkin step with an adapted rank.

    Args:
        tau: how much of the core a step may cut off, in its Frobenius norm.
        absolute: tau is that much itself, not a share of the core's norm.
    """

    tau: float = 0.1
    absolute: bool = False

    def __post_init__(self) -> None:
        in_range("dlrt", "[0, inf)" if self.absolute else "[0, 1)", tau=self.tau)

    def watch(self, run: Run) -> list[RemovableHandle]:
        """Hold what the cores' gradients are made of until the step."""
        scope, weights = run.scope, dict(spectral_weights(run))

        def arrived(path: str, layer: StructuredLayer, x: Tensor, gradient: Tensor) -> None:
            memory, core = run.memory(path, scope), weights[path].core.tensor()
            if memory.pop("complete", False) and not _has_gradient(core):  # those of a step never taken
                memory.pop("seen", None)
            memory.setdefault("seen", []).extend((x, gradient.detach()))

        handles = watch_gradients(run, arrived, lambda path: weights[path].core.trainable)
        for path, weight in weights.items():
            if weight.core.trainable:
                core = weight.core.tensor()
                handles.append(core.register_post_accumulate_grad_hook(_completed(run, path, scope)))
        return handles

    def gradients_ready(self, run: Run) -> None:
        """Let the optimizer move the outer factors alone, and remember where they stand."""
        for path, weight in spectral_weights(run):
            memory, core = run.memory(path), weight.core.tensor()
            for name in ("left", "right", "gradient"):  # of a step that failed
                memory.pop(name, None)
            if core.grad is None or not any(_has_gradient(leaf.tensor()) for leaf in _leaves(weight)):
                leave_out(weight, memory)
                continue
            if "seen" not in memory:
                raise Incompatible(f"{path}: dlrt has to be attached before the forward of the first step")
            memory["left"], memory["right"] = weight.left.tensor().clone(), weight.right.tensor().clone()
            memory["gradient"], core.grad = core.grad, None

    def stepped(self, run: Run) -> None:
        """Widen the bases, let the optimizer move the cores in them, and cut the ranks."""
        moved = [(path, w) for path, w in spectral_weights(run) if "left" in run.memory(path)]
        for path, weight in moved:
            widen(run, weight, run.adaptation.layers[path].op, run.memory(path))
        step_alone(run.optimizer, [weight.core.tensor() for _, weight in moved])
        for path, weight in moved:
            core = require_finite(weight.core.tensor(), f"{path}: the core")
            core.grad = None
            self.cut(run, weight)

    def cut(self, run: Run, weight: Spectral) -> None:
        """Leave of U S V^T what the tolerance asks for, as its SVD."""
        left, core, right = (_wide(leaf.tensor().detach()) for leaf in _leaves(weight))
        outer, sizes, inner = torch.linalg.svd(core)
        rank = kept_rank(sizes, self.tau if self.absolute else self.tau * float(sizes.norm()))
        rank = max(min(rank, largest(weight.shape)), min(LEAST, largest(weight.shape)))
        outer, inner = outer[:, :rank], inner[:rank]
        follow(run.optimizer, weight.left.tensor(), after=inner.T)
        follow(run.optimizer, weight.core.tensor(), before=outer.T, after=inner.T)
        follow(run.optimizer, weight.right.tensor(), before=outer.T)
        weight.resize(left @ outer, torch.diag(sizes[:rank]), inner @ right)


def _completed(run: Run, path: str, scope: str) -> Any:
    def accumulated(core: Tensor) -> None:
        run.memory(path, scope)["complete"] = True

    return accumulated


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def leave_out(weight: Spectral, memory: dict[str, Any]) -> None:
    """Let a weight that no gradient has reached stay as it is in this step."""
    memory.pop("seen", None)
    for leaf in _leaves(weight):
        leaf.tensor().grad = None


def _leaves(weight: Spectral) -> tuple[Leaf, Leaf, Leaf]:
    return weight.left, weight.core, weight.right


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor as it is decomposed, in float32 or better."""
    return tensor.to(exact_dtype(tensor))


def spectral_weights(run: Run) -> Iterator[tuple[str, Spectral]]:
    """Yield every weight with its path."""
    for path, weight in run.expressions.items():
        assert isinstance(weight, Spectral)
        yield path, weight


def largest(shape: tuple[int, ...]) -> int:
    """Return the largest rank: half of the smaller side, so that two bases fit beside each other."""
    return max(1, min(shape) // 2)


def kept_rank(sizes: Tensor, tolerance: float) -> int:
    """Return the smallest rank whose rest, of decreasing singular values (m,), has at most this norm.

    Example:
        >>> kept_rank(torch.tensor([5.0, 2.0, 0.4, 0.3]), 0.5)
        2
    """
    tails = sizes.square().flip(0).cumsum(0).flip(0).sqrt()  # of what is cut off at rank 0, 1, ...
    return int((tails > tolerance).sum())


def widen(run: Run, weight: Spectral, op: Op, memory: dict[str, Any]) -> None:
    """Put U S V^T into the wider bases, which does not change it, with the gradient of its core there.

    Args:
        run: the training.
        weight: whose outer factors the optimizer has moved by K - U S and L - S V^T.
        op: of its layer.
        memory: holds left, right and gradient as they were before, and what was seen.
    """
    left, right, seen = _wide(memory.pop("left")), _wide(memory.pop("right")), memory.pop("seen")
    memory.pop("complete", None)
    core = _wide(weight.core.tensor().detach()).clone()
    moved_left, moved_right = weight.left.tensor() - left, weight.right.tensor() - right
    wide_left = torch.linalg.qr(torch.cat([left @ core + moved_left, left], 1)).Q
    wide_right = torch.linalg.qr(torch.cat([core @ right + moved_right, right]).T).Q.T
    into, onto = wide_left.T @ left, right @ wide_right.T
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    gradient = core_gradient(pairs, wide_left, wide_right, op)
    gradient = as_stepped(gradient, into, onto, memory.pop("gradient"))
    follow(run.optimizer, weight.left.tensor(), after=onto)
    follow(run.optimizer, weight.core.tensor(), before=into, after=onto)
    follow(run.optimizer, weight.right.tensor(), before=into)
    weight.resize(wide_left, into @ core @ onto, wide_right)
    weight.core.tensor().grad = gradient.to(weight.core.tensor().dtype)


def core_gradient(pairs: list[tuple[Tensor, Tensor]], left: Tensor, right: Tensor, op: Op) -> Tensor:
    """Return left^T G right^T (k, k), from inputs and gradients of outputs, averaged over processes."""
    probe = nn.Parameter(left.new_zeros(left.shape[1], right.shape[0]))
    with torch.enable_grad():
        for x, gradient in pairs:
            op.low_rank(x.to(left), left @ probe, right).backward(gradient.to(left))
    average_gradients([probe])
    assert probe.grad is not None
    return probe.grad


def as_stepped(gradient: Tensor, into: Tensor, onto: Tensor, given: Tensor) -> Tensor:
    """Return the core's gradient in the wider bases, scaled as the one that the optimizer was to get.

    A clip of gradients or a gradient scaler acts after backward; the narrow gradient tells by how much.
    """
    narrow = into.T @ gradient @ onto.T
    size = narrow.square().sum()
    return gradient * torch.where(size == 0, 1, (narrow * given).sum() / size)


def follow(
    optimizer: Optimizer, parameter: Tensor, before: Tensor | None = None, after: Tensor | None = None
) -> None:
    """Let moments follow a parameter into other bases: before m after, and squared entries for squares.

    An optimizer that keeps anything else of a parameter starts anew with it.
    """
    drop_strange(optimizer, parameter)

    def turned(moment: Tensor, power: int = 1) -> Tensor:
        wide = _wide(moment)
        wide = wide if before is None else before**power @ wide
        return (wide if after is None else wide @ after**power).to(moment.dtype)

    transform(optimizer, parameter, turned, lambda moment: turned(moment, 2))


def step_alone(optimizer: Optimizer, parameters: list[Tensor]) -> None:
    """Take a step of the optimizer for these parameters, and for no other."""
    chosen = {id(parameter) for parameter in parameters}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in chosen]
    gradients = [parameter.grad for parameter in others]
    for parameter in others:
        parameter.grad = None
    try:
        optimizer.step()
    finally:
        for parameter, gradient in zip(others, gradients, strict=True):
            parameter.grad = gradient
