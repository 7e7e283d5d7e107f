"""Layers that hold expressions in the place of a model's own layers.

An adapted layer shares the parameter dictionary of the layer that it stands for: the stored tensors keep
their names and their identity, so ties, checkpoints, `state_dict` names and moves between devices work by
themselves, and the original layer can be put back at any time. These classes are no subclasses of the layers
that they stand for, so code that would rebuild a plain layer fails instead of dropping the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import Incompatible
from ..weights import LINEAR, Base, Composite, Convolution, Dropped, Foreign, Op, Weight
from .foreign import dequantised, identifying, requantised

_PLACE = "rankfold_place"  # an empty buffer that remembers dtype and device of a weight that is gone
_GONE = (
    "the layer's own weight is gone: an expression that is trained from scratch stands in its place; "
    "rankfold.fold(model) makes a plain layer of it"
)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class StructuredLayer(nn.Module):
    """A layer whose weight is an expression around the stored tensor of the layer that it stands for.

    Args:
        original: the layer that it stands for.

    Attributes:
        adapters: the expressions, by adapter name.
    """

    op: Op = LINEAR
    materialised = False  # the layer reads the matrix of its expression, so the expression must have one
    looked_up = False  # the layer reads rows of its expression

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)
        self._lender: tuple[StructuredLayer, ...] = ()
        self._active: tuple[Weight, ...] = ()
        self._released: tuple[tuple[int, ...], ...] = ()
        self._share(original)
        self.adapters = nn.ModuleDict()
        self.training = original.training

    def _share(self, original: nn.Module) -> None:
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", *_HOOKS):
            self.__dict__[name] = original.__dict__[name]

    def __getattr__(self, name: str) -> Any:
        """Return what the original knows of itself, such as `in_features` or `kernel_size`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("__"):
                raise
            return getattr(original[0], name)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, the original too, whose forward may be the one called."""
        self.original.train(mode)
        return super().train(mode)

    @property
    def original(self) -> nn.Module:
        """The layer that this one stands for."""
        return self._original[0]

    @property
    def lender(self) -> StructuredLayer | None:
        """The layer with the same stored tensor whose expressions this one uses, or None."""
        return self._lender[0] if self._lender else None

    @property
    def expression(self) -> Weight | None:
        """The expression that is applied now, or None where the plain layer is."""
        active = (self.lender or self)._active
        return active[0] if active else None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the stored matrix."""
        if self._released:
            return self._released[0][0], self._released[0][1]
        out, columns = self.matrix().shape
        return out, columns

    def matrix(self) -> Tensor:
        """Return the stored weight as a matrix (out, in)."""
        weight = self.stored()
        return weight.flatten(1) if weight.dim() > 2 else weight

    def stored(self) -> Tensor:
        """Return the stored weight itself, in its own shape and form."""
        weight = self._parameters["weight"]
        if weight is None:
            raise Incompatible(_GONE)
        return weight

    @property
    def is_released(self) -> bool:
        """Whether the stored weight is gone and the expression stands in its place."""
        return bool(self._released)

    def release(self) -> None:
        """Let go of the stored weight, because an expression that does not read it stands in its place."""
        twin = self.lender
        if twin is not None and twin.is_released and twin.original is self.original:
            self._released = twin._released  # one module at two places, whose parameters both layers share
            return
        stored = self.stored()
        self._released = (self.shape, tuple(stored.shape))
        self.register_buffer(_PLACE, stored.detach().new_empty(0), persistent=False)
        self._parameters["weight"] = None

    def restore(self, weight: nn.Parameter) -> None:
        """Hold a stored weight again."""
        self._released = ()
        self._buffers.pop(_PLACE, None)
        self._non_persistent_buffers_set.discard(_PLACE)
        self._parameters["weight"] = weight

    def store(self, matrix: Tensor) -> None:
        """Put a new stored weight, given as a matrix (out, in), in the place of the old one."""
        if self._released:
            like = self._buffers[_PLACE]
            assert like is not None
            value = matrix.to(like).reshape(self._released[1]).contiguous()
            self.restore(nn.Parameter(value))
            return
        old = self.stored()
        value = matrix.to(old.dtype).reshape(old.shape).contiguous()
        self._parameters["weight"] = nn.Parameter(value, requires_grad=old.requires_grad)

    def base(self) -> Base:
        """Return a new leaf that stands for the stored weight."""
        return Base(self, self.shape)

    def borrow(self, lender: StructuredLayer) -> None:
        """Use the expressions of a layer that shares this layer's stored tensor."""
        self._lender = (lender,)

    def activate(self, names: Sequence[str]) -> None:
        """Apply the named expressions, the first innermost; none of them restores the plain layer."""
        below: Weight | None = None
        for name in names:
            if name not in self.adapters:
                continue
            expression: Weight = self.adapters[name]  # type: ignore[assignment]
            for module in expression.modules():
                if isinstance(module, Base):
                    module.stand_on(below)
                if isinstance(module, Composite):
                    module.forget()
            below = expression
        self._active = () if below is None else (below,)

    def refuse(self, expression: Weight) -> str | None:
        """Return why this layer cannot hold an expression, or None."""
        if self.materialised and any(isinstance(m, Dropped) and m.probability for m in expression.modules()):
            return "reads its weight as a matrix, where dropout has no place; use dropout=0"
        return None

    def extra_repr(self) -> str:
        """Return the formula."""
        return self.original.extra_repr() if self.expression is None else self.expression.formula()


class StructuredLinear(StructuredLayer):
    """A linear layer, y = expression(x) + bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., in)."""
        expression = self.expression
        if expression is None:
            return self.original.forward(x)  # type: ignore[no-any-return]
        return expression.forward(x, self._parameters["bias"])


class StructuredTransposedLinear(StructuredLinear):
    """A linear layer that stores its weight as (in, out), such as the `Conv1D` of transformers."""

    def matrix(self) -> Tensor:
        """Return the stored weight as a matrix (out, in)."""
        return self.stored().T

    def store(self, matrix: Tensor) -> None:
        """Put a new stored weight, given as a matrix (out, in), in the place of the old one."""
        super().store(matrix.T)


class StructuredEmbedding(StructuredLayer):
    """An embedding, rows of the expression (vocabulary, dimension)."""

    looked_up = True

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows: ids (...) to (..., dimension)."""
        expression = self.expression
        if expression is None:
            return self.original.forward(ids)  # type: ignore[no-any-return]
        like = self._buffers[_PLACE] if self.is_released else self.stored()
        rows = expression.rows(ids).to(like.dtype)  # type: ignore[union-attr]
        if self.padding_idx is None or not torch.is_grad_enabled():
            return rows
        # As in the plain layer, the padding row is read but never trained.
        return torch.where((ids == self.padding_idx)[..., None], rows.detach(), rows)


class StructuredConv(StructuredLayer):
    """A convolution of one to three dimensions; the kernel is the expression (out, in / groups * window)."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        conv: Any = original
        self.op = Convolution(
            window=tuple(conv.kernel_size),
            stride=tuple(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else tuple(conv.padding),
            dilation=tuple(conv.dilation),
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            flat_padding=tuple(conv._reversed_padding_repeated_twice),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (batch, channels, *space)."""
        expression = self.expression
        if expression is None:
            return self.original.forward(x)  # type: ignore[no-any-return]
        if x.dim() == len(self.op.window) + 1:  # type: ignore[attr-defined]
            return self(x[None])[0]  # type: ignore[no-any-return]
        return expression(x, self._parameters["bias"], self.op)  # type: ignore[no-any-return]


class StructuredForeign(StructuredLinear):
    """A linear layer with a form of its own for its weight, such as a quantised one; it is called."""

    def matrix(self) -> Tensor:
        """Return the matrix (out, in) that the layer applies."""
        return dequantised(self.original)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that the layer applies."""
        return self.out_features, self.in_features

    def base(self) -> Base:
        """Return a new leaf that stands for the foreign layer."""
        return Foreign(self, self.shape)

    def identity(self) -> Tensor:
        """Return a plain tensor whose memory and version tell whether the stored weight has changed."""
        return identifying(self.stored())

    def call(self, x: Tensor, *, biased: bool = True) -> Tensor:
        """Call the foreign layer itself, with its bias or without."""
        bias = self._parameters["bias"]
        if biased or bias is None:
            return self.original.forward(x)  # type: ignore[no-any-return]
        return functional_call(self.original, {"bias": torch.zeros_like(bias)}, (x,))  # type: ignore[no-any-return]

    def store(self, matrix: Tensor) -> None:
        """Quantise a matrix (out, in) as the old weight was and put it in its place."""
        self._parameters["weight"] = requantised(self.stored(), matrix)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.original._save_to_state_dict(destination, prefix, keep_vars)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the foreign layer and the change."""
        expression = self.expression
        return self.call(x) if expression is None else expression(x, self._parameters["bias"])


class _Projection(StructuredLayer):
    """One stored matrix of an attention module, read by its parent as a matrix."""

    materialised = True

    def __init__(self, original: nn.Module, name: str) -> None:
        self._name = name
        super().__init__(original)

    def _share(self, original: nn.Module) -> None:
        """Share nothing: the parent registers the tensor."""
        self.__dict__["_stored"] = (original,)

    def stored(self) -> Tensor:
        """Return the stored weight."""
        found = self._holder._parameters[self._name]
        if found is None:
            raise Incompatible(_GONE)
        return found

    def release(self) -> None:
        """Let go of the stored weight, which the parent reads from here."""
        stored = self.stored()
        self._released = (self.shape, tuple(stored.shape))
        self.register_buffer(_PLACE, stored.detach().new_empty(0), persistent=False)
        self._holder._parameters[self._name] = None

    def restore(self, weight: nn.Parameter) -> None:
        """Hold a stored weight again."""
        self._released = ()
        self._buffers.pop(_PLACE, None)
        self._non_persistent_buffers_set.discard(_PLACE)
        self._holder._parameters[self._name] = weight

    @property
    def _holder(self) -> nn.Module:
        holder: nn.Module = self.__dict__["_stored"][0]
        return holder

    def store(self, matrix: Tensor) -> None:
        """Put a new stored weight in the place of the old one."""
        if self._released:
            self.restore(nn.Parameter(matrix.to(self._buffers[_PLACE]).contiguous()))
            return
        old = self.stored()
        parameter = nn.Parameter(matrix.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        self._holder._parameters[self._name] = parameter

    def current(self) -> Tensor:
        """Return the matrix that the parent is to use now."""
        if self.expression is None:
            return self.matrix()
        like = self._buffers[_PLACE] if self._released else self.matrix()
        return self.expression.dense().to(like.dtype)  # type: ignore[union-attr]


class _OutProjection(_Projection):
    """The output projection of an attention module, with its bias under its old name."""

    def _share(self, original: nn.Module) -> None:
        super()._share(original)
        StructuredLayer._share(self, original)


class StructuredAttention(StructuredLayer):
    """`nn.MultiheadAttention`, which reads its projections without calling them.

    The packed input projection (3 d, d) and the output projection (d, d) hold expressions of their own; their
    matrices are formed and handed to the original's forward.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__(original)
        if original.in_proj_weight is not None:
            self.in_proj = _Projection(original, "in_proj_weight")
        self.out_proj = _OutProjection(original.out_proj, "weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original with the matrices of the expressions."""
        matrices = {"out_proj.weight": self.out_proj.current()}
        if "in_proj" in self._modules:
            matrices["in_proj_weight"] = self.in_proj.current()
        return functional_call(self.original, matrices, args, kwargs)


_PRODUCTS = nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d
_EXACT: dict[type, type[StructuredLayer]] = {
    nn.Embedding: StructuredEmbedding,
    nn.Conv1d: StructuredConv,
    nn.Conv2d: StructuredConv,
    nn.Conv3d: StructuredConv,
}


def kind_of(module: nn.Module) -> type[StructuredLayer] | None:
    """Return the class that can stand for a module, or None.

    Subclasses of embeddings and convolutions with a forward of their own are refused, because what they do
    beside their product is not known; such subclasses of `nn.Linear` are called, not replaced.
    """
    if why_refused(module):
        return None
    for kind, structured in _EXACT.items():
        if isinstance(module, kind):
            return structured
    if isinstance(module, nn.Linear):
        weight = module.weight
        stored = type(weight) is nn.Parameter and type(weight.data) is Tensor
        return StructuredLinear if stored and not _own_forward(module, nn.Linear) else StructuredForeign
    return StructuredTransposedLinear


def _own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes something else than its kind; the hooks of accelerate only move tensors."""
    patched = "forward" in module.__dict__ and "_hf_hook" not in module.__dict__
    return patched or type(module).forward is not kind.forward


def why_refused(module: nn.Module) -> str | None:
    """Return why no class can stand for a module, as the end of a sentence, or None."""
    transposed = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
    if not transposed and not isinstance(module, _PRODUCTS):
        return "is no layer that can hold an expression"
    kind = next((kind for kind in _EXACT if isinstance(module, kind)), None)
    if (transposed and _own_forward(module, type(module))) or (kind and _own_forward(module, kind)):
        return "has a forward of its own, so what it does beside its product is not known"
    weight = module._parameters.get("weight")
    if weight is None or module._modules:
        return "computes its weight from other tensors (a parametrisation); remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "has no shape yet; call the model once first"
    if weight.is_meta and "_hf_hook" in module.__dict__:
        return "is offloaded and its weight is not there; adapt before dispatching the model"
    if getattr(module, "max_norm", None) is not None:
        return "has max_norm, which rewrites its stored rows in every forward; set max_norm=None"
    return None
