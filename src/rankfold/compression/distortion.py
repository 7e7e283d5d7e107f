"""How far the output of a changed model is from what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import Incompatible
from ..statistics.batches import call, prepared
from ..statistics.calibrating import calibrating

_NAMES = ("logits", "last_hidden_state")


def output_of(model: nn.Module, content: Any) -> Tensor:
    """Return what a model says of a batch: its logits, its last hidden states, or else its first tensor.

    Args:
        model: any module.
        content: the batch; of a mapping, labels are left out.

    Raises:
        Incompatible: it returns no tensor of numbers.
    """
    if isinstance(content, Mapping):
        content = {key: value for key, value in content.items() if key != "labels"}
    found = call(model, content)
    named = [found.get(n) if isinstance(found, Mapping) else getattr(found, n, None) for n in _NAMES]
    rest = tree_leaves(list(found.values()) if isinstance(found, Mapping) else found)
    for value in (*named, *rest):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return value
    raise Incompatible(
        "the model's output holds neither a loss nor a tensor of numbers to compare; pass loss="
    )


class Distortion:
    """The mean squared change of a model's output, over calibration batches, from what it was at first.

        delta = mean_x mean_j (f(x; W) - f(x; W~))_j^2

    Padding does not count. Outputs are kept, so the batches should be few.

    Args:
        model: as it is now.
        batches: of the calibration.
        worst: the largest change of an example instead of the mean over them.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> change = Distortion(model, [torch.eye(2)])
        >>> _ = model.weight.data.add_(2.0)
        >>> change()
        4.0
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], *, worst: bool = False) -> None:
        self.model, self.worst = model, worst
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.batches = [prepared(index, content, device, "padding") for index, content in enumerate(batches)]
        self.before = self._outputs()

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        with calibrating(self.model, []):
            return [output_of(self.model, batch.content).float() for batch in self.batches]

    def __call__(self) -> float:
        """Return the change now."""
        changes = [
            masked_mean((new - old).square(), batch.mask)
            for batch, old, new in zip(self.batches, self.before, self._outputs(), strict=True)
        ]
        found = torch.cat(changes)
        return float(found.max() if self.worst else found.mean())


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over each example's entries, of which padded tokens are none.

    Args:
        values: (batch, tokens, ...), or (batch, ...) where there is no mask or it does not fit.
        mask: (batch, tokens), true where a token counts, or None.

    Returns:
        (batch,).
    """
    if mask is None or values.shape[:2] != mask.shape:
        return values.flatten(1).mean(1)
    counted = mask.reshape(*mask.shape, *[1] * (values.dim() - 2))
    share = mask.float().mean(1).clamp(min=1e-9)
    return (values * counted).flatten(1).mean(1) / share
