"""AlphaRL: the change that reinforcement learning makes, extrapolated from early checkpoints.

    dW_k = W_k - W_0 ~ sigma_k u_k v_k^T,   z_k = sigma_k u_k,   z(a) = mean z + (a - mean a) q
    q = sum_k (a_k - mean a) (z_k - mean z) / sum_k (a_k - mean a)^2,   W* = W_0 + z(a*) v_K^T

Cai et al. 2025. W (out, in) is one weight, k = 1..K are checkpoints, a_k is the progress of each, such as its
accuracy, reward or step, and a* the progress that is asked for. The leading singular triplet carries the
change; its left vector z (out,) moves on a line, its right one v (in,) stays. A one-component partial
least-squares regression of z on one number, as in the paper, is the least-squares line, scaled columns or
not. Checkpoints from about the first 40 % of a training are what the paper uses.

This is no hook of a training: call `extrapolate`. Start: none.

Deviations from the official scripts: the predicted change is that from W_0 and is added to W_0 (there it is
added to a later checkpoint, which counts what that has changed twice); differences and decompositions are in
float32 or better, whatever the checkpoints' dtype; signs of the triplets are made to agree; R^2 of the line
and the agreement of the last two right vectors are reported for every weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import BaseMismatch, InvalidOption
from ...layers import require
from ...linalg import truncated_svd
from ..registry import dynamics

Checkpoint = Mapping[str, Tensor] | str | Path


@dataclass(frozen=True, eq=False)
class Line:
    """The extrapolated change of one weight, `left right^T`, and how far it can be trusted.

    Attributes:
        left: z(a*), (out,).
        right: v of the last checkpoint, (in,).
        r_squared: of the line through the z, at most 1.
        stability: |<v_K, v_(K-1)>|, in [0, 1].
        share: of the last change's squared Frobenius norm that its leading triplet carries, in [0, 1].
    """

    left: Tensor
    right: Tensor
    r_squared: float
    stability: float
    share: float

    def change(self) -> Tensor:
        """Return W* - W_0, (out, in)."""
        return torch.outer(self.left, self.right)


@dataclass(frozen=True, eq=False)
class Extrapolated:
    """The extrapolated change of a model.

    Attributes:
        lines: by name of the parameter.
        target: the progress that was asked for.
    """

    lines: Mapping[str, Line]
    target: float

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> nn.Module:
        """Add the changes to the base model, in place; sums are formed in float32 or better.

        Raises:
            BaseMismatch: the model has no such parameter of that shape.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, line in self.lines.items():
            _check_shape(name, parameters.get(name), (len(line.left), len(line.right)))
        for name, line in self.lines.items():
            value = parameters[name]
            value.copy_((_exact(value).flatten(1) + line.change()).view(value.shape))
        return model


@dynamics(
    "alpharl",
    function="rankfold.methods.dynamics.alpharl.extrapolate",
    title="On Predictability of Reinforcement Learning Dynamics for Large Language Models",
    year=2025,
    arxiv="2510.00553",
    code="caiyuchen-ustc/AlphaRL",
    formula="W* = W_0 + z(a*) v^T, z(a) the line through sigma_k u_k of dW_k over the progress a_k",
)
def extrapolate(
    model: nn.Module,
    checkpoints: Sequence[Checkpoint],
    progress: Sequence[float],
    target: float,
    *,
    iterations: int | None = None,
) -> Extrapolated:
    """Return the change that a training would have made at a given progress, from its early checkpoints.

    Args:
        model: with the weights W_0 that training began from; it is not changed.
        checkpoints: two or more, in the order of training: state dicts of the whole model, or folders of
            adapters that were saved while training.
        progress: a_k of every checkpoint, such as its accuracy, its reward or its step.
        target: a*, in the same unit.
        iterations: power iterations of a randomised decomposition; None takes the exact one.

    Returns:
        One line per weight of two or more dimensions that has changed in the last checkpoint.

    Raises:
        InvalidOption: fewer than two checkpoints, no change, NaN, or a progress that does not vary.
        BaseMismatch: a checkpoint lacks a weight or has it in another shape.

    Example:
        >>> import torch
        >>> model, change = torch.nn.Linear(3, 2), torch.outer(torch.ones(2), torch.ones(3))
        >>> early = [{"weight": model.weight.detach() + k * change} for k in (1, 2)]
        >>> found = extrapolate(model, early, [0.1, 0.2], 0.5)
        >>> found.lines["weight"].change().round().tolist()
        [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    """
    abscissae = _checked(checkpoints, progress, target)
    changes = [changes_of(model, checkpoint) for checkpoint in checkpoints]
    moved = [name for name in changes[-1] if bool(changes[-1][name].any())]
    if not moved:
        raise InvalidOption(
            "the last checkpoint does not differ from the model, so there is nothing to extrapolate"
        )
    lines = {}
    for name in moved:
        lacking = [k for k, change in enumerate(changes) if name not in change]
        if lacking:
            raise BaseMismatch(f"checkpoint {lacking[0]} lacks {name}, which the last one has")
        lines[name] = line([change[name] for change in changes], abscissae, target, iterations)
    return Extrapolated(lines, target)


def line(changes: Sequence[Tensor], progress: Tensor, target: float, iterations: int | None = None) -> Line:
    """Return the extrapolated change of one weight.

    Args:
        changes: W_k - W_0, each (out, in) in float32 or better.
        progress: a_k, (K,) in float64.
        target: a*.
        iterations: power iterations of a randomised decomposition; None takes the exact one.
    """
    tops: list[tuple[Tensor, Tensor, Tensor]] = []
    for change in changes:
        generator = torch.Generator().manual_seed(0)
        left, value, right = truncated_svd(change, 1, iterations=iterations, generator=generator)
        sign = -1.0 if tops and float(tops[-1][2] @ right[0]) < 0 else 1.0
        tops.append((sign * left[:, 0], value[0], sign * right[0]))
    tracks = torch.stack([value * left for left, value, _ in tops]).double()
    centred, offsets = progress - progress.mean(), tracks - tracks.mean(0)
    slope = (centred @ offsets.cpu()) / centred.square().sum()
    left = tracks.mean(0).cpu() + (target - progress.mean()) * slope
    rest = (offsets.cpu() - torch.outer(centred, slope)).square().sum()
    total, last = offsets.square().sum().cpu(), changes[-1]
    return Line(
        left=left.to(last),
        right=tops[-1][2],
        r_squared=float(1 - rest / total) if total > 0 else 1.0,
        stability=float((tops[-1][2] @ tops[-2][2]).abs()),
        share=float(tops[-1][1].square() / last.square().sum()),
    )


def changes_of(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return W_k - W_0 of every weight that a checkpoint holds, as matrices in float32 or better.

    Args:
        model: with W_0; it is not changed.
        checkpoint: a state dict of the whole model, or the folder of an adapter.

    Returns:
        Changes (out, in) by name of the parameter; (in, out) where the layer stores its weight so.
    """
    if isinstance(checkpoint, str | Path):
        return _adapted(model, checkpoint)
    changes = {}
    for name, start in model.named_parameters():
        if start.dim() < 2:
            continue
        value = checkpoint.get(name)
        _check_shape(name, value, tuple(start.shape))
        assert value is not None
        changes[name] = (_exact(value.to(start.device)) - _exact(start)).flatten(1)
    return changes


@torch.no_grad()
def _adapted(model: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    from ..persist import load

    adapted = load(copy.deepcopy(model), folder)
    names = {id(parameter): name for name, parameter in adapted.named_parameters()}
    changes = {}
    for layer in require(adapted).layers.values():
        if layer.expression is not None and layer.lender is None:
            stored, matrix = layer.stored(), layer.matrix()
            change = _exact(layer.expression.dense()) - _exact(matrix)
            is_transposed = stored.dim() == 2 and stored.stride() != matrix.stride()
            changes[names[id(stored)]] = change.T if is_transposed else change
    return changes


def _exact(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is None:
        raise BaseMismatch(f"{name} is missing, which the other side has")
    here = tuple(value.shape) if value.dim() == len(shape) else (value.shape[0], value[0].numel())
    if here != shape:
        raise BaseMismatch(f"{name} has shape {tuple(value.shape)} and {shape} was expected")


def _checked(checkpoints: Sequence[Checkpoint], progress: Sequence[float], target: float) -> Tensor:
    if len(checkpoints) < 2 or len(checkpoints) != len(progress):
        raise InvalidOption(
            f"a line needs two checkpoints or more, each with its progress, not {len(checkpoints)} with "
            f"{len(progress)}"
        )
    numbers = torch.tensor([*progress, target], dtype=torch.float64)
    if not bool(numbers.isfinite().all()) or bool((numbers[:-1] == numbers[0]).all()):
        raise InvalidOption(f"progress must be finite and differ between checkpoints, not {list(progress)}")
    return numbers[:-1]
