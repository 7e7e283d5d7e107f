"""Rules that open gates: real tokens, prompts, positions, invocations, classes, regions, a classifier."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
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

    adapter = ""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def own(self, model: nn.Module, adapter: str, shared: Mapping[str, str]) -> None:
        """Take the adapter's name."""
        self.adapter = adapter

    def compute(self, inputs: ModelInputs) -> Tensor:
        """Return the gate, (batch, token); closed everywhere once there is a cached prompt."""
        closed = torch.zeros(inputs.batch, inputs.tokens, dtype=torch.bool, device=inputs.device)
        name = f"prompt of {self.adapter}"
        if inputs.past and name not in inputs.kept:
            raise Incompatible(
                f"reft edits the prompt, and the one in this key-value cache was not seen by "
                f"{self.adapter!r}; pass a cache that this adapter has filled, or none"
            )
        inputs.kept[name] = True
        if inputs.past:
            return closed
        inside = inputs.prompt()
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


@dataclass(frozen=True)
class Found:
    """Where the invocation starts in every row that a key-value cache holds, and its last tokens.

    Attributes:
        start: (batch,), or the largest integer.
        last: (batch, fewer tokens than an invocation).
    """

    start: Tensor
    last: Tensor

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.start)

    def rows(self, index: Tensor) -> Found:
        """Return what is known of these rows."""
        index = index.to(self.start.device)
        return Found(self.start[index], self.last[index])

    def cropped(self, tokens: int) -> Found:
        """Return what is known when so many tokens are left."""
        return Found(torch.where(self.start < tokens, self.start, _NEVER), self.last[:, :0])


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
            return self.without_ids(inputs)
        if inputs.two_stacks and inputs.in_use:
            raise Incompatible(
                "alora looks for its invocation in one sequence, and an encoder-decoder has two"
            )
        name, ids = f"start of {self.invocation}", torch.where(inputs.real(), inputs.ids, -1)  # no padding
        found = inputs.kept.get(name)
        known, last = (found.start, found.last) if found is not None else (None, ids[:, :0])
        ids = torch.cat([last.to(ids).expand(len(ids), -1), ids], 1)  # it may be split over calls
        start = self.start_of(ids)
        start = torch.where(start == _NEVER, start, start + inputs.past - last.shape[1])
        if known is not None:
            start = torch.where(start == _NEVER, known.to(start.device), start)
        elif inputs.past and bool((start == _NEVER).any()):
            return self.without_prompt(inputs)
        inputs.kept[name] = Found(start, ids[:, max(0, ids.shape[1] + 1 - len(self.invocation)) :])
        place = inputs.past + torch.arange(inputs.tokens, device=inputs.device)
        return place[None] >= start[:, None]

    def without_ids(self, inputs: ModelInputs) -> Tensor:
        """Return a closed gate while the adapter is not in use.

        Raises:
            InvalidOption: it is.
        """
        if inputs.in_use:
            raise InvalidOption(
                "alora finds its invocation in input_ids; a model called with inputs_embeds has none"
            )
        return torch.zeros(inputs.batch, inputs.length or 1, dtype=torch.bool, device=inputs.device)

    def without_prompt(self, inputs: ModelInputs) -> Tensor:
        """Return a closed gate while the adapter is not in use, and remember nothing.

        Raises:
            Incompatible: it is, and a row may have been invoked in what the key-value cache holds.
        """
        if inputs.in_use:
            raise Incompatible(
                f"alora does not know whether {self.invocation} is in the prompt that this key-value cache "
                "holds; pass a cache that this model has filled, or none, or the invocation with these tokens"
            )
        return torch.zeros(inputs.batch, inputs.tokens, dtype=torch.bool, device=inputs.device)

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

    reads = ("classes", "class_labels")

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
        classes = _tensor(given, inputs.device)
        if classes is None or classes.shape not in ((inputs.batch,), (1,)) or not _whole(classes):
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

    adapter, reads = "", ("regions",)

    def own(self, model: nn.Module, adapter: str, shared: Mapping[str, str]) -> None:
        """Take the adapter's name."""
        self.adapter = adapter

    def compute(self, inputs: ModelInputs) -> Gate:
        """Return the gate, (batch or 1, point, 1)."""
        regions = inputs.given.get("regions", {})
        if not isinstance(regions, Mapping) or self.adapter not in regions:
            raise InvalidOption(
                f"lora-composer needs the region of {self.adapter!r}: call the model within "
                f"rankfold.gate_inputs(model, regions={{{self.adapter!r}: mask of the image}})"
            )
        given = regions[self.adapter]
        mask = _tensor(given, inputs.device)
        mask = mask[None] if mask is not None and mask.dim() == 2 else mask
        if mask is None or mask.dim() != 3 or mask.shape[0] not in (1, inputs.batch):
            shown = tuple(given.shape) if isinstance(given, Tensor) else repr(given)
            raise InvalidOption(
                f"lora-composer: the region of {self.adapter!r} must be (height, width) or ({inputs.batch}, "
                f"height, width) numbers, not {shown}"
            )
        return Gate(
            (mask.nan_to_num() != 0).float().flatten(1)[..., None], image=(mask.shape[1], mask.shape[2])
        )


def region_gate(**options: object) -> Regions:
    """Return the gate of an adapter's region."""
    return Regions()


class Classifier:
    """The gate that a first pass through the model gives: E experts, L of them each for `layerwise`."""

    runs_model = True

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
        if inputs.two_stacks:
            raise Incompatible("x-lora reads the hidden states of one stack, and an encoder-decoder has two")
        root = self._root[0]
        matrix, bias = (getattr(root, self._names[key]) for key in ("router", "bias"))
        closed = Gate(torch.zeros(1, 1, matrix.shape[0], device=inputs.device))
        hidden = self.first_pass.hidden(root, inputs, closed)
        logits = nn.functional.linear(hidden.to(matrix.dtype), matrix, bias)
        shares = (logits.unflatten(-1, (-1, self.experts)) / self.temperature).softmax(-1)
        if self.top_k is not None:
            kept = shares.topk(self.top_k, -1)
            shares = torch.zeros_like(shares).scatter(-1, kept.indices, kept.values)
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


def _tensor(given: Any, device: torch.device) -> Tensor | None:
    """Return what was given as a tensor, or None where it is no numbers."""
    try:
        return torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError):
        return None


def _whole(values: Tensor) -> bool:
    return not values.is_floating_point() and values.dtype != torch.bool
