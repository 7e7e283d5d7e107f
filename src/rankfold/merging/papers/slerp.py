"""Slerp: two models are interpolated along the great circle between them, tensor by tensor.

    th* = [sin((1 - t) w) th_1 + sin(t w) th_2] / sin w,   cos w = <th_1, th_2> / (||th_1|| ||th_2||)

Shoemake 1985, for rotations; on weights each tensor is one vector, and the angle is between the directions
while the norms stay those of the models. Between (almost) parallel or opposite tensors, |cos w| > 0.9995,
where the circle is not defined or rounding would decide, the interpolation is linear. Without t the weights
say the place, t = w_2 / (w_1 + w_2), which is 1/2 without those.
"""

import math

import torch
from torch import Tensor

from ...errors import InvalidOption
from ..parts import Parts
from ..registry import merger


@merger(
    "slerp",
    title="Animating Rotation with Quaternion Curves",
    year=1985,
    formula="[sin((1 - t) w) th_1 + sin(t w) th_2] / sin w, w the angle between th_1 and th_2",
    base="unused",
    most=2,
)
def slerp(parts: Parts, *, t: float | None = None, parallel: float = 0.9995) -> Tensor:
    """Return the spherical interpolation of two models.

    Args:
        parts: one tensor of two models.
        t: where on the way from the first to the second, 0..1; None takes it from the weights.
        parallel: the |cosine| above which the interpolation is linear, 0..1.

    Raises:
        InvalidOption: there are not two models, or t is outside 0..1.

    Example:
        >>> slerp(Parts("w", (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])), (1.0, 1.0)))
        tensor([0.7071, 0.7071])
    """
    if len(parts.models) != 2:
        raise InvalidOption(f"slerp interpolates two models, not {len(parts.models)}")
    place = _place(parts.weights, t)
    first, second = parts.models
    norms = [float(torch.linalg.vector_norm(m, dtype=torch.float64)) or 1.0 for m in parts.models]
    cosine = float((first.double() * second.double()).sum()) / norms[0] / norms[1]
    if abs(cosine) > parallel:
        return torch.lerp(first, second, place)
    angle = math.acos(cosine)
    start, end = math.sin((1 - place) * angle), math.sin(place * angle)
    return (start * first + end * second) / math.sin(angle)


def _place(weights: tuple[float, ...], t: float | None) -> float:
    total = sum(weights)
    place = t if t is not None else weights[1] / total if total else -1.0
    if not 0 <= place <= 1:
        raise InvalidOption(
            f"slerp: t={t} with weights {list(weights)} is no place between the models, in 0..1"
        )
    return place
