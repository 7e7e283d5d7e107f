"""Layers that hold expressions in the place of a model's own layers.

An adapted layer shares the parameter dictionary of the layer that it stands for: the stored tensors keep their
names and their identity, so ties, checkpoints, `state_dict` names and moves between devices work by themselves,
and the original layer can be put back at any time. These classes are no subclasses of the layers that they stand
for, so code that would rebuild a plain layer fails instead of dropping the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..weights import LINEAR, Base, Composite, Convolution, Dropped, Foreign, Op, Weight

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
        self._share(original)
        self.adapters = nn.ModuleDict()
        self.training = original.training

    def _share(self, original: nn.Module) -> None:
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", *_HOOKS):
            self.__dict__[name] = original.__dict__[name]

    @property
    def original(self) -> nn.Module:
        """The layer that this one stands for."""
        return self._original[0]

    @property
    def expression(self) -> Weight | None:
        """The expression that is applied now, or None where the plain layer is."""
        active = self._lender[0]._active if self._lender else self._active
        return active[0] if active else None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the stored matrix."""
        out, columns = self.matrix().shape
        return out, columns

    def matrix(self) -> Tensor:
        """Return the stored weight as a matrix (out, in)."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight.flatten(1) if weight.dim() > 2 else weight

    def store(self, matrix: Tensor) -> None:
        """Put a new stored weight, given as a matrix (out, in), in the place of the old one."""
        old = self._parameters["weight"]
        assert old is not None
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
            return "reads its weight as a matrix, where dropout on the input of the change has no place; use dropout=0"
        return None

    def extra_repr(self) -> str:
        """Return the formula."""
        return self.original.extra_repr() if self.expression is None else self.expression.formula()


class StructuredLinear(StructuredLayer):
    """A linear layer, y = expression(x) + bias."""

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., in)."""
        expression = self.expression
        if expression is None:
            return self.original.forward(x)  # type: ignore[no-any-return]
        return expression(x, self._parameters["bias"])  # type: ignore[no-any-return]


class StructuredTransposedLinear(StructuredLinear):
    """A linear layer that stores its weight as (in, out), such as the `Conv1D` of transformers."""

    def matrix(self) -> Tensor:
        """Return the stored weight as a matrix (out, in)."""
        return self._parameters["weight"].T  # type: ignore[union-attr]

    def store(self, matrix: Tensor) -> None:
        """Put a new stored weight, given as a matrix (out, in), in the place of the old one."""
        super().store(matrix.T)

    @property
    def nf(self) -> int:
        """Number of outputs, under the name that transformers uses."""
        return self.shape[0]


class StructuredEmbedding(StructuredLayer):
    """An embedding, rows of the expression (vocabulary, dimension)."""

    looked_up = True

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Length of a row."""
        return self.shape[1]

    @property
    def padding_idx(self) -> int | None:
        """The padding row of the original."""
        return self.original.padding_idx  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows: ids (...) to (..., dimension)."""
        expression = self.expression
        if expression is None:
            return self.original.forward(ids)  # type: ignore[no-any-return]
        return expression.rows(ids).to(self.matrix().dtype)


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
    """A linear layer that keeps its weight in a form of its own, such as a quantised one; its forward is called."""

    def matrix(self) -> Tensor:
        """Return the matrix (out, in) that the layer applies, read off from the identity."""
        module: Any = self.original
        dtype = getattr(module, "compute_dtype", None) or _foreign_dtype(module)
        with torch.no_grad():
            identity = torch.eye(module.in_features, dtype=dtype, device=module.weight.device)
            columns = module.forward(identity)
            return (columns if module.bias is None else columns - module.bias).T.contiguous()  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that the layer applies."""
        return self.original.out_features, self.original.in_features  # type: ignore[return-value]

    def base(self) -> Base:
        """Return a new leaf that stands for the foreign layer."""
        return Foreign(self, self.shape)

    def call(self, x: Tensor) -> Tensor:
        """Call the foreign layer itself, bias included."""
        return self.original.forward(x)  # type: ignore[no-any-return]

    def store(self, matrix: Tensor) -> None:
        """Quantise a matrix (out, in) as the old weight was and put it in its place."""
        from .foreign import requantised

        self._parameters["weight"] = requantised(self._parameters["weight"], matrix)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.original._save_to_state_dict(destination, prefix, keep_vars)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the foreign layer and the change."""
        expression = self.expression
        return self.call(x) if expression is None else expression(x, None)  # type: ignore[no-any-return]


def _foreign_dtype(module: nn.Module) -> torch.dtype:
    bias, weight = module.bias, module.weight
    if isinstance(bias, Tensor):
        return bias.dtype
    return weight.dtype if weight.dtype.is_floating_point else torch.float32  # type: ignore[union-attr,return-value]


class _Projection(StructuredLayer):
    """One stored matrix of an attention module, read by its parent as a matrix."""

    materialised = True

    def __init__(self, original: nn.Module, name: str) -> None:
        self._name = name
        super().__init__(original)

    def _share(self, original: nn.Module) -> None:
        """Share nothing: the parent registers the tensor."""
        self.__dict__["_stored"] = (original,)

    def matrix(self) -> Tensor:
        """Return the stored weight as a matrix (out, in)."""
        return self._stored[0]._parameters[self._name]  # type: ignore[no-any-return]

    def store(self, matrix: Tensor) -> None:
        """Put a new stored weight in the place of the old one."""
        old = self.matrix()
        parameter = nn.Parameter(matrix.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        self._stored[0]._parameters[self._name] = parameter

    def current(self) -> Tensor:
        """Return the matrix that the parent is to use now."""
        return self.matrix() if self.expression is None else self.expression.dense().to(self.matrix().dtype)


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

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.in_proj = _Projection(original, "in_proj_weight")
        self.out_proj = _OutProjection(original.out_proj, "weight")  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the original, such as `batch_first`, where this module has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original with the matrices of the two expressions."""
        matrices = {"in_proj_weight": self.in_proj.current(), "out_proj.weight": self.out_proj.current()}
        return functional_call(self.original, matrices, args, kwargs)


def kind_of(module: nn.Module) -> type[StructuredLayer] | None:
    """Return the class that can stand for a module, or None.

    Subclasses of embeddings and convolutions with a forward of their own are refused, because what they do
    beside their product is not known; such subclasses of `nn.Linear` are called, not replaced.
    """
    exact: dict[type, type[StructuredLayer]] = {
        nn.Embedding: StructuredEmbedding,
        nn.Conv1d: StructuredConv,
        nn.Conv2d: StructuredConv,
        nn.Conv3d: StructuredConv,
    }
    if type(module) in exact:
        return None if getattr(module, "max_norm", None) is not None else exact[type(module)]
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward and type(module.weight) in (nn.Parameter, Tensor)
        return StructuredLinear if plain and type(module.weight.data) is Tensor else StructuredForeign
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return StructuredTransposedLinear
    return None
