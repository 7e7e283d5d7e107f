"""Rules that open gates: real tokens, the prompt, a row's class, an adapter's region, a classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import InvalidOption
from ..layers import FirstPass, ModelInputs
from ..weights import Gate
from .routing import check_experts


class Real:
    """The gate that is open at tokens that are no padding."""

    def compute(self, inputs: ModelInputs) -> Tensor:
        """Return the gate, (batch, token)."""
        return inputs.real()


class Prompt:
    """The gate that is open at the prompt: the real tokens before the first label."""

    def compute(self, inputs: ModelInputs) -> Tensor:
        """Return the gate, (batch, token)."""
        return inputs.prompt()


def real_gate(**options: object) -> Real:
    """Return the gate of real tokens."""
    return Real()


def prompt_gate(**options: object) -> Prompt:
    """Return the gate of the prompt."""
    return Prompt()


class Classes:
    """The gate that opens a row's own class.

    Args:
        classes: how many there are.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(self, inputs: ModelInputs) -> Gate:
        """Return the gate, (batch, 1, class)."""
        given = inputs.given.get("classes", inputs.given.get("class_labels"))
        if given is None:
            raise InvalidOption(
                "kind needs the class of every row: with rankfold.gate_inputs(model, classes=tensor), or the "
                "model's own argument class_labels"
            )
        classes = torch.as_tensor(given, device=inputs.device)
        if classes.shape not in ((inputs.batch,), (1,)) or classes.is_floating_point():
            raise InvalidOption(f"kind: classes must be {inputs.batch} whole numbers, not {given!r}")
        if bool((classes < -1).any() or (classes >= self.classes).any()):
            raise InvalidOption(f"kind: classes must be from -1 (none) to {self.classes - 1}, not {given!r}")
        opened = frozenset(classes.unique().tolist())
        numbers = torch.arange(self.classes, device=inputs.device)
        return Gate((classes[:, None, None] == numbers).float(), opened=opened)


def class_gate(*, classes: int, **options: object) -> Classes:
    """Return the gate of so many classes."""
    if classes < 1:
        raise InvalidOption(f"kind: classes must be at least 1, not {classes}")
    return Classes(classes)


class Regions:
    """The gate that is open inside an adapter's own region."""

    adapter = ""

    def own(self, model: nn.Module, adapter: str, shared: Mapping[str, str]) -> None:
        """Take the adapter's name."""
        self.adapter = adapter

    def compute(self, inputs: ModelInputs) -> Gate:
        """Return the gate, (batch or 1, point, 1)."""
        regions = inputs.given.get("regions", {})
        if self.adapter not in regions:
            raise InvalidOption(
                f"lora-composer needs the region of {self.adapter!r}: call the model within "
                f"rankfold.gate_inputs(model, regions={{{self.adapter!r}: mask of the image}})"
            )
        mask = torch.as_tensor(regions[self.adapter], device=inputs.device)
        mask = mask[None] if mask.dim() == 2 else mask
        if mask.dim() != 3 or mask.shape[0] not in (1, inputs.batch):
            raise InvalidOption(
                f"lora-composer: the region of {self.adapter!r} must be (height, width) or ({inputs.batch}, "
                f"height, width), not {tuple(mask.shape)}"
            )
        return Gate((mask != 0).float().flatten(1)[..., None], image=(mask.shape[1], mask.shape[2]))


def region_gate(**options: object) -> Regions:
    """Return the gate of an adapter's region."""
    return Regions()


class Classifier:
    """The gate that a first pass through the model gives: E experts, L of them each for `layerwise`."""

    def __init__(self, experts: int, top_k: int | None, temperature: float, scale: float) -> None:
        self.experts, self.top_k, self.temperature, self.scale = experts, top_k, temperature, scale
        self._root: tuple[nn.Module, ...] = ()
        self._names: Mapping[str, str] = {}

    def own(self, model: nn.Module, adapter: str, shared: Mapping[str, str]) -> None:
        """Take the model and where on it R and b are."""
        self._root, self._names, self.first_pass = (model,), shared, FirstPass(f"first pass of {adapter}")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(self, inputs: ModelInputs) -> Gate:
        """Return the gate, (batch, token, L E)."""
        root = self._root[0]
        matrix, bias = (getattr(root, self._names[key]) for key in ("router", "bias"))
        closed = Gate(torch.zeros(1, 1, matrix.shape[0], device=inputs.device))
        hidden = self.first_pass.hidden(root, inputs, closed)
        logits = nn.functional.linear(hidden.to(matrix.dtype), matrix, bias)
        shares = (logits.unflatten(-1, (-1, self.experts)) / self.temperature).softmax(-1)
        if self.top_k is not None:
            shares = shares * (shares >= shares.topk(self.top_k, -1).values[..., -1:])
        return Gate(self.scale * shares.flatten(-2))


def count_of(experts: int | Sequence[str]) -> int:
    """Return how many experts are meant."""
    return experts if isinstance(experts, int) else len(experts)


def classifier_gate(
    *, experts: int | Sequence[str], top_k: int | None, temperature: float, scale: float, **options: object
) -> Classifier:
    """Return the gate of the classifier."""
    check_experts("x-lora", count_of(experts), top_k)
    if not temperature > 0 or not math.isfinite(scale):
        raise InvalidOption(f"x-lora: temperature must be positive, not {temperature}, and scale finite")
    return Classifier(count_of(experts), top_k, temperature, scale)
