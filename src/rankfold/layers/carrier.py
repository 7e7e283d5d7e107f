"""Computing gates from a model's inputs, and keeping them right under gradient checkpointing.

Gates are set by a hook on the root model before its forward. Recomputation of a checkpointed block must see
the gates of the forward that it repeats, also when another forward came in between; so the function that is
handed to the checkpoint restores them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InvalidOption, near_names
from ..weights import Gate, Gates
from .cache import keep_with, kept_with

_CHECKPOINT = "_gradient_checkpointing_func"  # where the blocks of transformers keep theirs


@dataclass
class ModelInputs:
    """What a gate may depend on.

    Attributes:
        ids: (batch, token) token ids, or None where embeddings were given.
        mask: (batch, cached + token) attention mask, or None.
        labels: (batch, token) labels of a causal loss, -100 where there is none, or None.
        batch: rows of the present call.
        length: tokens of the present call, or None where the model reads no sequence.
        past: tokens that the key-value cache holds already.
        cache: the cache object, or None.
        device: where the gate is needed.
        given: everything that the model was called with, by name, and what `gate_inputs` holds.
        kept: what rules and routers remember with the key-value cache; empty at its first forward.
        again: `again(gate, **changes)` runs the model once more on the same inputs, without gradients, with
            this gate in the place of the one to be computed and some arguments changed (None leaves one out).
        in_use: the adapter whose gate is computed is in use.
        two_stacks: the model has an encoder, which these inputs are for, and a decoder.
    """

    ids: Tensor | None
    mask: Tensor | None
    labels: Tensor | None
    batch: int
    length: int | None
    past: int
    cache: Any
    device: torch.device
    given: Mapping[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    again: Callable[..., Any] = field(default=lambda **changes: None, repr=False)
    in_use: bool = True
    two_stacks: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the present call.

        Raises:
            InvalidOption: the model was called on something else than a sequence.
        """
        if self.length is None:
            raise InvalidOption("the model was called without input_ids or inputs_embeds, which a gate needs")
        return self.length

    def real(self) -> Tensor:
        """Return which tokens of the present call are no padding, (batch, token) bool."""
        real = torch.ones(self.batch, self.length or 1, dtype=torch.bool, device=self.device)
        mask = None if self.two_stacks else self.mask  # that of an encoder says nothing of its decoder
        if mask is None or mask.dim() != 2 or mask.shape[1] < real.shape[1]:
            return real
        return mask[:, -real.shape[1] :].bool()

    def prompt(self) -> Tensor:
        """Return which real tokens come before a row's first label, or all of them, (batch, token).

        Where nothing but the first token does, the row has no prompt of its own.
        """
        real = self.real()
        if self.labels is None:
            return real
        before = real & ((self.labels != -100).cumsum(1) == 0)
        return torch.where(before.sum(1, keepdim=True) > 1, before, real)  # the first token never has a label


class GateRule(Protocol):
    """Computes one gate per forward of the root model.

    A rule with an attribute `remembers` that is true also sees the forwards in which its adapter is not in
    use. One with a method `own(model, adapter, shared)` is handed the model, the adapter's name and the
    attributes of its shared tensors. One with an attribute `runs_model` that is true calls `inputs.again`: it
    comes after the others, whose gates hold in that pass, while those of its own kind are closed. An
    attribute `reads` names what it reads of `gate_inputs`.
    """

    def compute(self, inputs: ModelInputs) -> Tensor | Gate:
        """Return the gate, (batch, token), or with further axes and facts as a `Gate`."""


class NeverRead(UserWarning):
    """Layers have left a loss of their own in training, and nothing has asked for it."""


class Carrier:
    """Sets the gates of an adapted model before each forward.

    Attributes:
        gates: that the layers read.
        rules: what computes them, by key.
        wanted: keys of the adapters in use.
        extra: inputs of gates that are no arguments of the model (`gate_inputs`).
    """

    def __init__(self, root: nn.Module) -> None:
        self.gates = Gates()
        self.rules: dict[str, GateRule] = {}
        self.wanted: set[str] = set()
        self.extra: dict[str, Any] = {}
        self._root = (root,)
        self._handles: list[Any] = []
        self._mark = uuid.uuid4().hex  # of what it keeps with caches
        self._within = False
        self._unread = 0

    def add(self, key: str, rule: GateRule) -> None:
        """Compute a gate under a key from now on."""
        self.rules[key] = rule
        if not self._handles:
            root = self._root[0]
            self._handles = [
                root.register_forward_pre_hook(self.enter, with_kwargs=True),
                root.register_forward_hook(self.leave, always_call=True),
            ]

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
        if self._within:
            return
        inputs = read_inputs(module, args, kwargs, self.extra)
        self._begin(inputs)
        for key, rule in sorted(self.rules.items(), key=lambda item: _runs_model(item[1])):
            inputs.in_use = key in self.wanted
            if inputs.in_use or getattr(rule, "remembers", False):
                inputs.again = functools.partial(self._once_more, module, args, kwargs, key)
                value = rule.compute(inputs)
                self.gates.current[key] = value if isinstance(value, Gate) else Gate(value[..., None])
        for part in module.modules():
            function = part.__dict__.get(_CHECKPOINT)
            if function is not None and not isinstance(function, Replay):
                part.__dict__[_CHECKPOINT] = Replay(function, self.gates)

    def _begin(self, inputs: ModelInputs) -> None:
        gates = self.gates
        left = gates.collected or gates.drawn
        self._unread = self._unread + 1 if left and torch.is_grad_enabled() else 0
        if self._unread == 2:
            how = "loss + rankfold.auxiliary_loss(model)" if gates.collected else "rankfold.remix_loss"
            warnings.warn(
                NeverRead(f"the router of {next(iter(left))!r} gets no gradient of its own: train on {how}"),
                stacklevel=2,
            )
        gates.current, gates.collected, gates.drawn, gates.past = {}, {}, {}, inputs.past
        gates.recording, gates.running = torch.is_grad_enabled(), True
        known = kept_with(inputs.cache, self._mark) if inputs.past else None
        gates.kept = inputs.kept = {} if known is None else known
        if inputs.cache is not None:
            keep_with(inputs.cache, self._mark, gates.kept)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep what this forward has decided with the cache that it has made; its gates are not read on."""
        cache = getattr(output, "past_key_values", None)
        if self._within:
            return
        self.gates.running = False
        if cache is not None and kept_with(cache, self._mark) is None:
            keep_with(cache, self._mark, self.gates.kept)

    @torch.no_grad()
    def _once_more(
        self, module: nn.Module, args: Any, kwargs: Any, key: str, gate: Gate, **changes: Any
    ) -> Any:
        names = list(inspect.signature(module.forward).parameters)[: len(args)]
        args = (
            tuple(changes.pop(n, value) for n, value in zip(names, args, strict=False)) + args[len(names) :]
        )
        kwargs = {name: value for name, value in {**kwargs, **changes}.items() if value is not None}
        closed, gates = Gate(torch.zeros_like(gate.values[..., :1]), opened=frozenset()), self.gates
        known = {k: g for k, g in gates.current.items() if not _runs_model(self.rules[k])}
        before = gates.current, gates.collected, gates.drawn, gates.recording
        gates.current = {**dict.fromkeys(self.wanted, closed), **known, key: gate}
        gates.collected, gates.drawn, gates.recording = {}, {}, False
        self._within = True
        try:
            return module(*args, **kwargs)
        finally:
            gates.current, gates.collected, gates.drawn, gates.recording = before
            self._within = False

    def read_collected(self) -> dict[str, Callable[[], Tensor]]:
        """Return the losses that layers have left in the last forward; they count as read."""
        self._unread = -1 if self.gates.collected else self._unread
        return self.gates.collected

    def read_drawn(self) -> dict[str, Callable[[], Tensor]]:
        """Return the log-probabilities of what was drawn in the last forward; they count as read."""
        self._unread = -1
        return self.gates.drawn

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
        moving = {key: gate for key, gate in self.gates.current.items() if gate.values.requires_grad}
        values = [gate.values for gate in moving.values()]  # as arguments, so that their gradients come back
        restored = _Restored(function, self.gates, self.gates.current, tuple(moving))
        return self.checkpoint(restored, *args, *values, **kwargs)


@dataclass
class _Restored:
    function: Callable[..., Any]
    gates: Gates
    seen: dict[str, Gate]
    moving: tuple[str, ...] = ()
    ran: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gates, own = self.gates, len(args) - len(self.moving)
        given = {k: replace(self.seen[k], values=v) for k, v in zip(self.moving, args[own:], strict=True)}
        args, before = args[:own], (gates.current, gates.replaying)
        gates.current = {**self.seen, **given}
        gates.replaying, self.ran = self.ran, True
        try:
            return self.function(*args, **kwargs)
        finally:
            gates.current, gates.replaying = before


def read_inputs(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> ModelInputs:
    """Find ids, mask and cache among the arguments of a model's forward.

    Raises:
        InvalidOption: there is no tensor among them.
    """
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
    sequence: Tensor | None = ids if ids is not None else embeds
    tensors = [value for value in (sequence, *given.values()) if isinstance(value, Tensor)]
    leading = tensors[0] if tensors else None
    if leading is None or not leading.dim():
        raise InvalidOption(
            f"{type(module).__name__} was called without input_ids or inputs_embeds, which a gate needs"
        )
    is_sequence = leading is sequence and leading.dim() == (3 if ids is None else 2)
    cache, labels = given.get("past_key_values"), given.get("labels")
    return ModelInputs(
        ids=ids,
        mask=given.get("attention_mask"),
        labels=labels if labels is not None and labels.shape == leading.shape[:2] else None,
        batch=leading.shape[0],
        length=leading.shape[1] if is_sequence else None,
        past=_length(cache),
        cache=cache,
        device=leading.device,
        given={**given, **(extra or {})},
        two_stacks=bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)),
    )


@contextlib.contextmanager
def gate_inputs(model: nn.Module, **inputs: Any) -> Iterator[nn.Module]:
    """Within the block, gates read these inputs beside the arguments that the model is called with.

    Args:
        model: an adapted model.
        inputs: what the adapters' gates ask for, such as `classes` (batch,) for kind or `regions` for
            lora-composer: each method's page says which.

    Raises:
        NotAdapted: the model holds no adapter.
        InvalidOption: no adapter reads an input of such a name.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = rf.adapt(model, "kind", rank=2, classes=3, targets="0")
        >>> with rf.gate_inputs(model, classes=torch.tensor([0, 2])):
        ...     model(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """
    from .adaptation import require

    carrier = require(model).carrier
    read = sorted({name for rule in carrier.rules.values() for name in getattr(rule, "reads", ())})
    for name in inputs:
        if name not in read:
            listed = near_names(name, read) or f"; they read {', '.join(read) or 'none'}"
            raise InvalidOption(f"no adapter of the model reads the gate input {name!r}{listed}")
    before, carrier.extra = carrier.extra, {**carrier.extra, **inputs}
    try:
        yield model
    finally:
        carrier.extra = before


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Return what the layers of an adapted model want added to the loss of the last forward.

    Routed mixtures leave a loss that balances their experts. It is zero where nothing was left: outside
    training, or with methods that need none. `rankfold.TrainerCallback` and the command line add it
    themselves.

    Args:
        model: an adapted model that has just been called, in training mode.

    Returns:
        A scalar with gradients.

    Raises:
        NotAdapted: the model holds no adapter.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = rf.adapt(model, "mixture", rank=2, experts=3, targets="0").train()
        >>> loss = model(torch.randn(2, 5, 8)).square().mean() + rf.auxiliary_loss(model)
        >>> loss.backward()
    """
    from .adaptation import require

    losses = [loss() for loss in require(model).carrier.read_collected().values()]
    device = losses[0].device if losses else next(model.parameters()).device
    return torch.stack(losses).sum() if losses else torch.zeros((), device=device)


def _runs_model(rule: GateRule) -> bool:
    return bool(getattr(rule, "runs_model", False))


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
