"""The permutations of hidden units that an architecture allows, found by its modules and their names.

- Chains (`nn.Sequential`): the outputs of a linear layer or convolution may change places where everything up
  to the next one acts on each of them alone (activations, pooling) or on all of them alike (norms).
- Feed-forward blocks: the hidden units; gate and up share one permutation.
- Attention: whole heads, by the groups that share keys and values. What is inside a head stays, for rotary
  embeddings tie it to its place.
- The residual stream, on request: every axis of the hidden size that nothing else moves.

What stands between, such as a layer of an unknown kind, stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from ..errors import UnsupportedLayer
from ..layers.feedforward import gated_block
from .permutations import Axis, Specification, check, named_tensors, shared

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.LogSigmoid, nn.Threshold, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    nn.Dropout3d, nn.AlphaDropout,
)  # fmt: skip
_SPATIAL = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.LPPool1d, nn.LPPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d,
    nn.ReplicationPad2d,
)  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Query, key, value and output projection, relative to the block.
_ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("query", "key", "value", "dense"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
)
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_HEAD_SIZES = ("head_dim", "attention_head_size")
# First and second projection of a feed-forward block without a gate.
_FEED_FORWARD = (
    ("fc1", "fc2"),
    ("lin1", "lin2"),
    ("c_fc", "c_proj"),
    ("linear1", "linear2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("ffn", "ffn_output"),
    ("intermediate.dense", "output.dense"),
)
# Libraries in whose feed-forward blocks nothing but an activation stands between layers of these names.
_KNOWN = ("transformers.", "torch.nn.")


def specification(model: nn.Module, *, residual: bool = False, inputs: Any = None) -> Specification:
    """Return the permutations of hidden units that a model allows.

    Args:
        model: chains of linear layers and convolutions, models of transformers with separate query, key and
            value projections, GPT-2, and models that are put together from such parts.
        residual: move the residual stream too, which models of transformers with an output head allow; it is
            tried out before it is returned.
        inputs: an example of what the model is called with; the specification is tried out on it.

    Raises:
        UnsupportedLayer: no part of the architecture is known; or one that looks known has more parameters.
        Incompatible: tied weights would have to move differently, or the trial changes the output.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> dict(specification(model).units)
        {'0': 8}
    """
    found = _Found(model)
    found.walk("", model)
    if not found.axes:
        raise UnsupportedLayer(
            f"no hidden units of {type(model).__name__} are known that could change places; pass spec= with "
            "the permutation, or None, of each axis of its tensors"
        )
    if residual:
        found.add_residual()
        inputs = found.example() if inputs is None else inputs
    spec = shared(found.specification(), model)
    if inputs is not None:
        check(model, spec, inputs)
    return spec


class _Found:
    """The axes of a model's tensors on which a permutation acts, as far as they are found."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = named_tensors(model)
        self.axes: dict[str, dict[int, Axis]] = {}

    def specification(self) -> Specification:
        return Specification(
            {
                name: tuple(axes.get(dim) for dim in range(self.tensors[name].dim()))
                for name, axes in self.axes.items()
            }
        )

    def mark(self, name: str, dim: int, axis: Axis) -> None:
        """Let a permutation act on an axis of a tensor, where there is such a tensor."""
        if name in self.tensors:
            self.axes.setdefault(name, {})[dim] = axis

    def outputs(self, path: str, layer: nn.Module, axis: Axis) -> None:
        """Let a permutation act on what a projection gives."""
        self.mark(f"{path}.weight", _out_dim(layer), axis)
        self.mark(f"{path}.bias", 0, axis)

    def inputs(self, path: str, layer: nn.Module, axis: Axis) -> None:
        """Let a permutation act on what a projection takes."""
        self.mark(f"{path}.weight", 1 - _out_dim(layer), axis)

    def walk(self, path: str, module: nn.Module) -> None:
        """Find the permutations within a module."""
        if _is_chain(module):
            chain = _Chain(self)
            for name, part in _links(path, module):
                if not chain.take(name, part):
                    chain.close()
                    self.walk(name, part)
            return
        for recognise in _BLOCKS:
            recognise(self, path, module)
        for name, child in module._modules.items():
            if child is not None:
                self.walk(_join(path, name), child)

    def add_residual(self) -> None:
        """Let one permutation act on every axis of the hidden size that none acts on yet.

        Raises:
            UnsupportedLayer: the hidden size is not known.
        """
        size = getattr(getattr(self.model, "config", None), "hidden_size", None)
        if not isinstance(size, int):
            raise UnsupportedLayer(
                f"residual: {type(self.model).__name__} has no configuration with a hidden_size, by which "
                "the residual stream is found; pass spec="
            )
        stream = Axis("residual", size)
        tables = {f"{p}.weight" for p, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            for dim in range(1 if name in tables else 0, tensor.dim()):
                if tensor.shape[dim] == size and dim not in self.axes.get(name, {}):
                    self.mark(name, dim, stream)

    def example(self) -> Any:
        """Return the inputs that models of transformers bring along.

        Raises:
            UnsupportedLayer: there are none.
        """
        found = getattr(self.model, "dummy_inputs", None)
        if not found:
            raise UnsupportedLayer(
                f"residual: pass inputs=, an example of what {type(self.model).__name__} is called with, "
                "on which the permutation is tried out"
            )
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in found.items()}


# Chains -----------------------------------------------------------------------------------------------


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _links(path: str, chain: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are called one after another, those of inner chains too."""
    for name, part in chain._modules.items():
        if part is not None and _is_chain(part):
            yield from _links(_join(path, name), part)
        elif part is not None:
            yield _join(path, name), part


class _Chain:
    """What flows through a chain: hidden units, and the tensors that follow them so far.

    They are entered only when a layer is reached that takes them in; those that leave the chain must stay.
    """

    def __init__(self, found: _Found) -> None:
        self.found = found
        self.close()

    def close(self) -> None:
        """Forget the units: what comes next needs them in their places."""
        self.axis: Axis | None = None
        self.layout = ""  # units on the last axis ("features"), on axis 1 ("channels"), or in blocks ("flat")
        self.followers: list[tuple[str, int]] = []

    def take(self, path: str, module: nn.Module) -> bool:
        """Go through one module; return whether it is known."""
        if isinstance(module, (*_ELEMENTWISE, *_INSTANCE_NORMS)) or _is_single_prelu(module):
            return self._follow(path, "weight", "bias", "running_mean", "running_var")
        if isinstance(module, nn.Flatten):
            return self._flatten(module)
        if isinstance(module, _SPATIAL):
            return self.axis is None or self.layout == "channels"
        if isinstance(module, nn.Embedding):
            return self._start(path, module.embedding_dim, "features", ("weight", 1))
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            return self._project(path, module)
        return self._norm(path, module)

    def _follow(self, path: str, *names: str) -> bool:
        """Let the tensors of a module, where it has them, follow the units."""
        self.followers += [
            (f"{path}.{name}", 0)
            for name in names
            if f"{path}.{name}" in self.found.tensors and self.found.tensors[f"{path}.{name}"].dim()
        ]
        return True

    def _flatten(self, module: nn.Flatten) -> bool:
        if self.axis is None or self.layout == "features":
            return self.axis is None or module.start_dim == -1
        self.layout = "flat"
        return module.start_dim == 1 and module.end_dim == -1

    def _norm(self, path: str, module: nn.Module) -> bool:
        axis = self.axis
        if axis is None:
            return False
        if isinstance(module, nn.GroupNorm):
            fits = module.num_groups == 1 and module.num_channels == axis.units
        elif isinstance(module, (*_BATCH_NORMS, nn.PReLU)):
            size = module.num_features if isinstance(module, _BATCH_NORMS) else module.num_parameters
            fits = size % axis.units == 0
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            shape: Sequence[int] = module.normalized_shape
            fits = shape[0] % axis.units == 0 and (len(shape) > 1) == (self.layout == "channels")
        else:
            return False
        return fits and self._follow(path, "weight", "bias", "running_mean", "running_var")

    def _project(self, path: str, module: Any) -> bool:
        """Go through a linear layer or convolution: the units before it are known now, and new ones start."""
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            return False
        is_linear = isinstance(module, nn.Linear)
        if not is_linear and module.groups > 1:
            return self._depthwise(path, module)
        taken = module.in_features if is_linear else module.in_channels
        self._enter(path, taken, ("features", "flat") if is_linear else ("channels",))
        size = module.out_features if is_linear else module.out_channels
        return self._start(path, size, "features" if is_linear else "channels", ("weight", 0), ("bias", 0))

    def _depthwise(self, path: str, module: Any) -> bool:
        alone = module.groups == module.in_channels == module.out_channels
        fits = alone and self.axis is not None and self.axis.units == module.groups
        return fits and self.layout == "channels" and self._follow(path, "weight", "bias")

    def _enter(self, path: str, taken: int, layouts: tuple[str, ...]) -> None:
        axis = self.axis
        if axis is None or self.layout not in layouts:
            return
        if taken == axis.units or (self.layout == "flat" and taken % axis.units == 0):
            for name, dim in (*self.followers, (f"{path}.weight", 1)):
                self.found.mark(name, dim, axis)

    def _start(self, path: str, units: int, layout: str, *followers: tuple[str, int]) -> bool:
        self.axis, self.layout = Axis(path, units), layout
        self.followers = [(f"{path}.{name}", dim) for name, dim in followers]
        return True


def _is_single_prelu(module: nn.Module) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


# Blocks of transformers -------------------------------------------------------------------------------


def _attention(found: _Found, path: str, module: nn.Module) -> None:
    """Heads, by the groups that share keys and values."""
    names = _first_present(module, _ATTENTION)
    if names is None:
        return
    query, key, value, output = (module.get_submodule(name) for name in names)
    size = _head_size(path, module, names, query)
    heads = Axis(_join(path, "heads"), _out_size(key) // size)
    for name, layer in zip(names[:3], (query, key, value), strict=True):
        found.outputs(_join(path, name), layer, heads)
    found.inputs(_join(path, names[3]), output, heads)
    for name, tensor in module.named_parameters():
        is_projection = name.rpartition(".")[0] in names
        if not is_projection and not _stays(name, tensor.shape, size):
            if not _is_query_norm(name) or tensor.shape not in [(_out_size(query),), (_out_size(key),)]:
                raise UnsupportedLayer(
                    f"{_join(path, name)} {tuple(tensor.shape)} stands in attention, and how it moves with "
                    "the heads is not known; pass spec="
                )
            found.mark(_join(path, name), 0, heads)


def _stays(name: str, shape: Sequence[int], head_size: int) -> bool:
    """Whether a parameter beside the projections is the same for all heads, or comes after them."""
    inside = _is_query_norm(name) and tuple(shape) == (head_size,)
    return inside or name.startswith(("output.", "LayerNorm.")) or "distance_embedding" in name


def _is_query_norm(name: str) -> bool:
    return name.startswith(("q_norm", "k_norm", "q_layernorm", "k_layernorm"))


def _head_size(path: str, module: nn.Module, names: Sequence[str], query: nn.Module) -> int:
    """Return how many entries a head has.

    Raises:
        UnsupportedLayer: neither that nor the number of heads is written anywhere.
    """
    inner = module.get_submodule(names[0].rpartition(".")[0])
    holders = [holder for holder in (inner, module, getattr(module, "config", None)) if holder is not None]
    size, count = _first_number(holders, _HEAD_SIZES), _first_number(holders, _HEAD_COUNTS)
    if size or count:
        return size or _out_size(query) // count
    raise UnsupportedLayer(f"{path}: this attention does not say how many heads it has; pass spec=")


def _first_number(holders: Sequence[Any], names: Sequence[str]) -> int:
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if isinstance(value, int)), 0)


def _gpt2_attention(found: _Found, path: str, module: nn.Module) -> None:
    """Heads of queries, keys and values that one matrix gives, one after another."""
    if type(module).__name__ != "GPT2Attention" or hasattr(module, "q_attn"):
        return
    count: Any = module.num_heads
    name = _join(path, "heads")
    found.outputs(_join(path, "c_attn"), module.get_submodule("c_attn"), Axis(name, count, groups=3))
    found.inputs(_join(path, "c_proj"), module.get_submodule("c_proj"), Axis(name, count))


def _torch_attention(found: _Found, path: str, module: nn.Module) -> None:
    """Heads of torch's own attention."""
    if not isinstance(module, nn.MultiheadAttention) or module.bias_k is not None:
        return
    name = _join(path, "heads")
    fused, single = Axis(name, module.num_heads, groups=3), Axis(name, module.num_heads)
    found.mark(_join(path, "in_proj_weight"), 0, fused)
    found.mark(_join(path, "in_proj_bias"), 0, fused)
    for part in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        found.mark(_join(path, part), 0, single)
    found.mark(_join(path, "out_proj.weight"), 1, single)


def _gated(found: _Found, path: str, module: nn.Module) -> None:
    """Hidden units of down(act(gate x) * up x)."""
    block = gated_block(module)
    if block is None:
        return
    gate, up, down = (_join(path, name) for name in block.names)
    layers = block.projections()
    units = Axis(_join(path, "units"), block.width)
    found.outputs(gate, layers[0], units)
    found.outputs(up, layers[1], units)
    found.inputs(down, layers[2], units)


def _feed_forward(found: _Found, path: str, module: nn.Module) -> None:
    """Hidden units of second(act(first x)), with what norm stands between."""
    names = _first_present(module, _FEED_FORWARD)
    if names is None or not type(module).__module__.startswith(_KNOWN):
        return
    first, second = (module.get_submodule(name) for name in names)
    size = _out_size(first)
    if second.weight.shape[1 - _out_dim(second)] != size:  # type: ignore[index]
        return
    units = Axis(_join(path, "units"), size)
    found.outputs(_join(path, names[0]), first, units)
    found.inputs(_join(path, names[1]), second, units)
    for name, child in module.named_children():
        weight = child._parameters.get("weight")
        if weight is not None and weight.shape == (size,) and "ffn" in name:
            found.mark(_join(path, f"{name}.weight"), 0, units)
            found.mark(_join(path, f"{name}.bias"), 0, units)


_BLOCKS: tuple[Callable[[_Found, str, nn.Module], None], ...] = (
    _attention,
    _gpt2_attention,
    _torch_attention,
    _gated,
    _feed_forward,
)


def _first_present(module: nn.Module, choices: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    """Return the first names under all of which the module has plain projections."""
    return next((names for names in choices if all(_is_projection(module, name) for name in names)), None)


def _is_projection(module: nn.Module, name: str) -> bool:
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return False
    plain = isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    return plain and isinstance(layer._parameters.get("weight"), nn.Parameter)


def _out_dim(layer: nn.Module) -> int:
    """Return which axis of a projection's weight its outputs are: GPT-2 stores the transpose."""
    return 1 if type(layer).__name__ == "Conv1D" else 0


def _out_size(layer: nn.Module) -> int:
    weight: Any = layer.weight
    return int(weight.shape[_out_dim(layer)])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
