"""Computing gates from a model's inputs, and keeping them right under gradient checkpointing.

Gates are set by a hook on the root model before its forward. Recomputation of a checkpointed block must see
the gates of the forward that it repeats, also when another forward came in between; so the function that is
handed to the checkpoint restores them.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..weights import Gates

_CHECKPOINT = "_gradient_checkpointing_func"  # where the blocks of transformers keep theirs


@dataclass
class ModelInputs:
    """What a gate may depend on.

    Attributes:
        ids: (batch, token) token ids, or None where embeddings were given.
        mask: (batch, cached + token) attention mask, or None.
        labels: (batch, token) labels of a causal loss, -100 where there is none, or None.
        batch, tokens: size of the present call.
        past: tokens that the key-value cache holds already.
        cache: the cache object, or None.
        device: where the gate is needed.
    """

    ids: Tensor | None
    mask: Tensor | None
    labels: Tensor | None
    batch: int
    tokens: int
    past: int
    cache: Any
    device: torch.device


class GateRule(Protocol):
    """Computes one gate per forward of the root model."""

    def compute(self, inputs: ModelInputs) -> Tensor:
        """Return the gate, (batch, token)."""


@dataclass
class CacheMemory:
    """A value per key-value cache, forgotten with the cache."""

    values: weakref.WeakKeyDictionary[Any, Tensor] = field(default_factory=weakref.WeakKeyDictionary)

    def __deepcopy__(self, memo: Any) -> CacheMemory:
        return CacheMemory()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: Any) -> None:
        self.values = weakref.WeakKeyDictionary()


class Carrier:
    """Sets the gates of an adapted model before each forward."""

    def __init__(self, root: nn.Module) -> None:
        self.gates = Gates()
        self.rules: dict[str, GateRule] = {}
        self._root = (root,)
        self._handles: list[Any] = []

    def add(self, key: str, rule: GateRule) -> None:
        """Compute a gate under a key from now on."""
        self.rules[key] = rule
        if not self._handles:
            hook = self._root[0].register_forward_pre_hook(self.enter, with_kwargs=True)
            self._handles.append(hook)

    def discard(self, keys: set[str]) -> None:
        """Stop computing the gates under these keys."""
        self.rules = {key: rule for key, rule in self.rules.items() if key not in keys}
        if not self.rules:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._unwrap()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute every gate for this call and see to it that recomputation finds them again."""
        inputs = read_inputs(module, args, kwargs)
        self.gates.current = {key: rule.compute(inputs) for key, rule in self.rules.items()}
        for part in module.modules():
            function = part.__dict__.get(_CHECKPOINT)
            if function is not None and not isinstance(function, Replay):
                part.__dict__[_CHECKPOINT] = Replay(function, self.gates)

    def _unwrap(self) -> None:
        for part in self._root[0].modules():
            function = part.__dict__.get(_CHECKPOINT)
            if isinstance(function, Replay):
                part.__dict__[_CHECKPOINT] = function.checkpoint


@dataclass
class Replay:
    """A checkpoint function whose recomputation sees the gates of its forward."""

    checkpoint: Callable[..., Any]
    gates: Gates

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function` with the gates as they are now."""
        return self.checkpoint(_Restored(function, self.gates, self.gates.current), *args, **kwargs)


@dataclass
class _Restored:
    function: Callable[..., Any]
    gates: Gates
    seen: dict[str, Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, self.gates.current = self.gates.current, self.seen
        try:
            return self.function(*args, **kwargs)
        finally:
            self.gates.current = before


def read_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelInputs:
    """Find ids, mask and cache among the arguments of a model's forward."""
    names = [
        n for n, p in inspect.signature(module.forward).parameters.items() if p.kind.name != "VAR_KEYWORD"
    ]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ids = given.get("input_ids")
    if (
        ids is None
        and args
        and isinstance(args[0], Tensor)
        and args[0].dim() == 2
        and not args[0].is_floating_point()
    ):
        ids = args[0]
    embeds = given.get("inputs_embeds", args[0] if args and isinstance(args[0], Tensor) else None)
    leading = ids if ids is not None else embeds
    if leading is None or leading.dim() < 2:
        raise ValueError(
            f"{type(module).__name__} was called without input_ids or inputs_embeds, which a gate needs"
        )
    cache, labels = given.get("past_key_values"), given.get("labels")
    return ModelInputs(
        ids=ids,
        mask=given.get("attention_mask"),
        labels=labels if labels is not None and labels.shape == leading.shape[:2] else None,
        batch=leading.shape[0],
        tokens=leading.shape[1],
        past=_length(cache),
        cache=cache,
        device=leading.device,
    )


def _length(cache: Any) -> int:
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else 0


def checkpoint(model: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a function inside an adapted model so that recomputation sees the gates of its forward.

    Models of transformers need nothing: their own checkpointing is wrapped. A model that calls
    `torch.utils.checkpoint.checkpoint` itself calls this instead.

    Args:
        model: the adapted model.
        function: what to checkpoint.
        args: its arguments.
        kwargs: options of `torch.utils.checkpoint.checkpoint`.
    """
    from torch.utils import checkpoint as torch_checkpoint

    from .adaptation import adaptation_of

    adaptation = adaptation_of(model)
    options = {"use_reentrant": False, **kwargs}
    if options["use_reentrant"] and torch.is_grad_enabled():
        args = _with_gradients(args)
    if adaptation is None:
        return torch_checkpoint.checkpoint(function, *args, **options)
    return Replay(torch_checkpoint.checkpoint, adaptation.carrier.gates)(function, *args, **options)


def _with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let an input require a gradient: reentrant checkpointing drops all gradients where none does."""
    if any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return args
    floating = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
    return tuple(a.detach().requires_grad_() if f else a for a, f in zip(args, floating, strict=True))
