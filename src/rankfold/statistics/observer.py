"""Watching one batch run through a model: activations by hooks, gradients as each of them arrives."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, UnsupportedLayer
from ..weights.kernels import applied
from .batches import Batch, Loss, loss_of
from .calibrating import hooks
from .finite import require_finite
from .reducers import Seen, Side
from .rows import count_rows, inputs_of, leading, looked_up, outputs_of, rows
from .watched import Use, Watched

Deliver = Callable[[Watched, Side, Seen], None]


class Reached(BaseException):
    """Every watched layer was called, and nothing after them is needed."""


class _Identities:
    """Numbers tensors, the same number for the same values in the same memory."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[weakref.ref[Tensor], int]] = {}
        self._next = 0

    def number(self, x: Tensor | None) -> int:
        """Return the number of a tensor; one that is gone lends its memory to a new number."""
        key = None if x is None or not x.numel() else _identity(x)
        known, number = self._known.get(key, (None, 0))
        if known is not None and known() is not None:
            return number
        self._next += 1
        if x is not None and key is not None:
            self._known[key] = (weakref.ref(x), self._next)
        return self._next


def _identity(x: Tensor) -> Any:
    return x.data_ptr(), x._version, tuple(x.shape), x.stride(), x.dtype, x.device


@dataclass
class Calls:
    """Which inputs the watched weights met in one batch.

    Attributes:
        inputs: by path, the numbers of the inputs, in the order of the calls.
        tokens: by path, the unmasked rows.
    """

    inputs: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def same_input(self, watched: Watched) -> bool:
        """Say whether a weight met the inputs that its leader met."""
        return self.inputs.get(watched.path, []) == self.inputs.get(watched.leader.path, [])


class Observer:
    """Sees one batch and hands on what the watched weights meet.

    Args:
        model: in the state of a calibration pass.
        watched: the weights.
        batch: that is run.
        sides: what is looked at.
        deliver: takes what is seen.
        seed: of the probes for "curvature".
        probes: how many of them.
        stop: whether to end the forward when every weight was called.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Iterable[Watched],
        batch: Batch,
        *,
        sides: frozenset[Side],
        deliver: Deliver,
        seed: int = 0,
        probes: int = 1,
        stop: bool = False,
    ) -> None:
        self.model, self.watched, self.batch = model, list(watched), batch
        self.sides, self.deliver, self.seed, self.probes = sides, deliver, seed, probes
        self.waiting = {w.path for w in self.watched} if stop else None
        self.calls, self.identities, self.probe = Calls(), _Identities(), -1
        self.arrived: set[str] = set()
        self.count = batch.count()

    @property
    def differentiates(self) -> bool:
        """Whether a backward pass is needed."""
        return bool(self.sides & {"gradient", "curvature"})

    def run(self, loss: Loss | None) -> Calls:
        """Run the batch and return which inputs were met."""
        with hooks() as handles:
            for weight in self.watched:
                for use in weight.uses:
                    hook = self._forward_hook(weight, use)
                    handles.append(use.module.register_forward_hook(hook, with_kwargs=True))
            if self.differentiates:
                self._differentiate(loss, handles)
            else:
                with torch.no_grad(), contextlib.suppress(Reached):
                    loss_of(self.model, self.batch, loss, needed=False)
        return self.calls

    # Activations --------------------------------------------------------------------------------------

    def _forward_hook(self, weight: Watched, use: Use) -> Callable[..., None]:
        def called(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if module is use.module:  # an adapted layer may call its original, which has the same hooks
                with torch.no_grad():
                    self._called(weight, use, args, kwargs, output)

        return called

    def _called(self, weight: Watched, use: Use, args: Any, kwargs: Any, output: Any) -> None:
        x = _attended(use, args, kwargs, "input" in self.sides) if use.part else _first(args, kwargs)
        layer, mask = use.layer, self.batch.mask
        self.calls.inputs.setdefault(weight.path, []).append(
            self.identities.number(None if use.part == "out_proj" else x)
        )
        x = _batch_first(use, x)
        tokens = count_rows(leading(layer, x, output), mask)
        self.calls.tokens[weight.path] = self.calls.tokens.get(weight.path, 0) + tokens
        if "input" in self.sides and weight.leader is weight:
            self._activations(weight, "input", inputs_of(layer, x))
        if "output" in self.sides:
            self._activations(weight, "output", outputs_of(layer, output))
        if "ids" in self.sides and layer.looked_up:
            self.deliver(weight, "ids", Seen(rows=looked_up(x, mask), weight=layer))
        if self.waiting is not None:
            self.waiting.discard(weight.path)
            if not self.waiting:
                raise Reached

    def _activations(self, weight: Watched, side: Side, activations: Tensor) -> None:
        found = rows(activations, self.batch.mask)
        require_finite(found.values, f"the {side} of {weight.path}")
        self.deliver(weight, side, Seen(rows=found))

    # Gradients ----------------------------------------------------------------------------------------

    def _differentiate(self, loss: Loss | None, handles: list[Any]) -> None:
        with torch.enable_grad(), _Taps(self.watched, self._gradient) as taps, self._attention():
            for weight in self.watched:
                if not weight.foreign:
                    hook = self._gradient_hook(weight)
                    handles.append(weight.layer.stored().register_post_accumulate_grad_hook(hook))
            found = loss_of(self.model, self.batch, loss, needed=True)
            assert found is not None
            if not found.requires_grad:
                raise Incompatible(
                    f"batch {self.batch.index}: the loss depends on none of the targeted weights, so there "
                    "is no gradient; was it computed without a graph?"
                )
            if "curvature" in self.sides:
                with _second_derivatives(self.batch):
                    self._curvature(found)
            else:
                found.backward()
                taps.flush()

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of attention that can be differentiated twice, where that is needed."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH) if "curvature" in self.sides else contextlib.nullcontext()

    def _gradient_hook(self, weight: Watched) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            self._gradient(weight, weight.matrix_of(gradient.detach()))

        return arrived

    @torch.no_grad()
    def _gradient(self, weight: Watched, gradient: Tensor) -> None:
        """Hand on one weight's gradient (out, in), or its part in a probe of the Hessian."""
        require_finite(gradient, f"the gradient of {weight.path}")
        if self.probe < 0:
            self.deliver(weight, "gradient", Seen(gradient=gradient, weight=weight.layer, count=self.count))
        else:
            self.arrived.add(weight.path)
            product = gradient * self._signs(weight)
            self.deliver(weight, "curvature", Seen(gradient=product, weight=weight.layer, probe=self.probe))

    def _curvature(self, loss: Tensor) -> None:
        """Differentiate `v . gradient` once more for every probe v."""
        stored = [weight.layer.stored() for weight in self.watched]
        found = torch.autograd.grad(loss, stored, create_graph=True, allow_unused=True)
        gradients: dict[str, tuple[Watched, Tensor]] = {}
        for weight, gradient in zip(self.watched, found, strict=True):
            if gradient is not None:  # torch's annotation does not know of unused weights
                gradients[weight.path] = (weight, weight.matrix_of(gradient))
        for weight, gradient in gradients.values():
            self._gradient(weight, gradient.detach())
        for probe in range(self.probes):
            self.probe = probe
            self.arrived.clear()
            terms = [(g * self._signs(w)).sum() for w, g in gradients.values() if g.requires_grad]
            if terms:
                torch.stack(terms).sum().backward(retain_graph=probe + 1 < self.probes)
            for weight, gradient in gradients.values():
                if weight.path not in self.arrived:  # the loss is linear in this weight
                    self._gradient(weight, torch.zeros_like(gradient, requires_grad=False))

    def _signs(self, weight: Watched) -> Tensor:
        """Return the probe of a weight, entries +-1, from seed, path, batch and number alone."""
        matrix = weight.layer.matrix()
        text = f"{self.seed}/{weight.path}/{self.batch.index}/{self.probe}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(0, 2, matrix.shape, generator=generator, dtype=torch.int8)
        return (2 * drawn - 1).to(matrix.device, matrix.dtype)


@contextlib.contextmanager
def _second_derivatives(batch: Batch) -> Iterator[None]:
    """Say what it means where torch has no derivative of a derivative.

    Raises:
        UnsupportedLayer: an operation of the model can be differentiated once only.
    """
    try:
        yield
    except RuntimeError as error:
        if "differentiate twice" not in str(error) and not isinstance(error, NotImplementedError):
            raise
        raise UnsupportedLayer(
            f"batch {batch.index}: hessian_diagonal needs second derivatives, which an operation of the "
            f"model does not have ({str(error).splitlines()[0]}); use squared_gradient"
        ) from None


def _first(args: Any, kwargs: Any) -> Tensor:
    """Return the input of a layer, however it is passed."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _attended(use: Use, args: Any, kwargs: Any, needed: bool) -> Tensor:
    """Return what the packed projection of an attention module meets.

    Raises:
        UnsupportedLayer: query, key and value are different tensors, so that there is no one input.
    """
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    query: Tensor = given["query"]
    if needed and use.part == "in_proj" and not (query is given["key"] and query is given["value"]):
        raise UnsupportedLayer(
            f"{use.path}: input statistics of a packed projection need self-attention, where query, key and "
            "value are one tensor; gradient statistics work here"
        )
    return query


def _batch_first(use: Use, x: Tensor) -> Tensor:
    """Return activations (batch, tokens, ...) of an attention module that may take (tokens, batch, ...)."""
    if not use.part or x.dim() != 3 or getattr(use.module, "batch_first", True):
        return x
    return x.transpose(0, 1)


class _Tap(torch.autograd.Function):
    """Passes a layer's output on and, in backward, tells its gradient and the layer's input."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, tell: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tell = tell
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.tell(grad, ctx.saved_tensors[0])
        return grad, None, None, None


class _Taps:
    """Forms `dL/dW = sum (dL/dy)^T x` of weights without gradients, such as quantised ones.

    The product with the stored weight is replaced where the layer makes it, so that the changes of adapters
    around it do not count. A weight that is used several times is handed on once, when all uses have come.
    """

    def __init__(self, watched: Iterable[Watched], deliver: Callable[[Watched, Tensor], None]) -> None:
        self.watched, self.deliver = [w for w in watched if w.foreign], deliver
        self.open: dict[str, int] = {}
        self.parts: dict[str, tuple[Watched, Tensor]] = {}

    def __enter__(self) -> _Taps:
        self.undo = contextlib.ExitStack()
        for weight in self.watched:
            for use in weight.uses:
                self.undo.enter_context(self._patched(weight, use.layer.original))
        return self

    def __exit__(self, *error: object) -> None:
        self.undo.close()

    @contextlib.contextmanager
    def _patched(self, weight: Watched, module: nn.Module) -> Iterator[None]:
        own = module.__dict__.get("forward")
        plain = module.forward
        anchor = torch.zeros((), requires_grad=True)

        def forward(x: Tensor) -> Tensor:
            y: Tensor = plain(x)
            if not torch.is_grad_enabled():
                return y
            self.open[weight.path] = self.open.get(weight.path, 0) + 1
            result: Tensor = applied(_Tap, y, x.detach(), anchor, lambda dy, x: self._tell(weight, dy, x))
            return result

        module.__dict__["forward"] = forward
        try:
            yield
        finally:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own

    @torch.no_grad()
    def _tell(self, weight: Watched, grad: Tensor, x: Tensor) -> None:
        part = grad.flatten(0, -2).float().T @ x.flatten(0, -2).float()
        if weight.path in self.parts:
            part = self.parts[weight.path][1] + part
        self.parts[weight.path] = (weight, part)
        self.open[weight.path] -= 1
        if not self.open[weight.path]:
            self.deliver(*self.parts.pop(weight.path))

    def flush(self) -> None:
        """Hand on the weights of which some use had no gradient."""
        for weight, gradient in self.parts.values():
            self.deliver(weight, gradient)
        self.parts.clear()
