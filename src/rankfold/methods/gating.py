"""Rules that open gates: real tokens, prompts, positions, invocations, classes, regions, a classifier."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidOption
from ..layers import FirstPass, ModelInputs
from ..weights import Gate
from .routing import check_experts

_NEVER = torch.iinfo(torch.int64).max


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


class Positions:
    """The gate that is open at the first and last tokens of the prompt.

    Args:
        first, last: how many tokens at each end.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def compute(self, inputs: ModelInputs) -> Tensor:
        """Return the gate, (batch, token); closed everywhere once there is a cached prompt."""
        inside = torch.ones(inputs.batch, inputs.tokens, dtype=torch.bool, device=inputs.device)
        if inputs.mask is not None and inputs.mask.shape == inside.shape:
            inside = inputs.mask.bool()
        if inputs.labels is not None and bool((inputs.labels == -100).any()):
            inside = inside & ((inputs.labels != -100).cumsum(1) == 0)
        if inputs.past:
            return torch.zeros_like(inside)
        length, order = inside.sum(1, keepdim=True), inside.cumsum(1)
        half = length // 2
        first, last = half.clamp_max(self.first), half.clamp_max(self.last)
        return inside & ((order <= first) | (order > length - last))


def positions_gate(*, positions: str, **options: float) -> Positions:
    """Read positions such as "f7+l7".

    Raises:
        InvalidOption: the text is of another form.
    """
    match = re.fullmatch(r"f(\d+)\+l(\d+)", positions)
    if match is None:
        raise InvalidOption(f"reft: positions must read like 'f7+l7', not {positions!r}")
    return Positions(int(match[1]), int(match[2]))


class Invoked:
    """The gate that opens where the invocation starts and stays open, across calls that share a cache.

    It also reads what the base alone puts into a cache.

    Args:
        invocation: token ids.
    """

    remembers = True

    def __init__(self, invocation: Sequence[int]) -> None:
        self.invocation = tuple(invocation)

    def compute(self, inputs: ModelInputs) -> Tensor:
        """Return the gate, (batch, token)."""
        if inputs.ids is None:
            raise InvalidOption(
                "alora finds its invocation in input_ids; a model called with inputs_embeds has none"
            )
        start = self.start_of(inputs.ids)
        start = torch.where(start == _NEVER, start, start + inputs.past)
        name = f"start of {self.invocation}"
        if name in inputs.kept:
            start = torch.where(start == _NEVER, inputs.kept[name].to(start.device), start)
        inputs.kept[name] = start
        place = inputs.past + torch.arange(inputs.tokens, device=inputs.device)
        return place[None] >= start[:, None]

    def start_of(self, ids: Tensor) -> Tensor:
        """Return where the last occurrence in ids (batch, token) starts, (batch,), or the largest integer."""
        size = len(self.invocation)
        none = torch.full((ids.shape[0],), _NEVER, device=ids.device)
        if ids.shape[1] < size:
            return none
        hits = (ids.unfold(1, size, 1) == torch.tensor(self.invocation, device=ids.device)).all(-1)
        place = torch.arange(hits.shape[1], device=ids.device)
        last = torch.where(hits, place, -1).max(1).values
        return torch.where(last < 0, none, last)


def invocation_gate(*, invocation: Any, **options: float) -> Invoked:
    """Return the gate of an invocation.

    Raises:
        InvalidOption: the invocation is empty or holds other things than token ids.
    """
    tokens = list(invocation) if isinstance(invocation, Sequence) else []
    if not tokens or not all(isinstance(token, int) for token in tokens):
        raise InvalidOption(f"alora needs invocation=(token ids of the invocation), not {invocation!r}")
    return Invoked(tokens)


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
        self._root, self._names = (model,), shared
        self.first_pass = FirstPass(f"first pass of x-lora {adapter!r}")

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
