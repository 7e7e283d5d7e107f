"""The forms that a compressed model takes outside of Rankfold: two plain layers for one, or one dense layer.

y = B (A x) + b        a linear layer (out, in) is Linear(in, r) and then Linear(r, out)
rows of B A            an embedding (vocabulary, d) is Embedding(vocabulary, r) and then Linear(r, d)
B * (A * x) + b        a convolution is one with r channels, in every group, and then a 1x1 convolution
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, UnsupportedLayer
from ..formats.files import read_json, write_json, write_text
from ..layers import StructuredConv, StructuredEmbedding, StructuredLayer, adaptation_of
from ..layers.adaptation import Adaptation, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULE = "modeling_factored"  # the file beside the weights that transformers runs, where it is trusted to


@torch.no_grad()
def unfold(model: nn.Module) -> nn.Module:
    """Turn the low-rank weights of a compressed model into pairs of plain layers: it is a plain model then.

    Every weight B A becomes `nn.Sequential(first, second)` of stock layers, each of which trains, saves,
    quantises and takes adapters like any other: the names are `<path>.0` and `<path>.1`.

    Args:
        model: a compressed model; changed in place and returned.

    Returns:
        The model, which holds no adapter any more.

    Raises:
        NotAdapted: the model was not compressed.
        UnsupportedLayer: a weight is no product of two factors, is a part of `nn.MultiheadAttention`, which
            reads its weights without calling layers, or is shared by two layers; nothing was changed then.
        Incompatible: several adapters are in the model.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> unfold(rf.compress(model, "svd", keep=0.5, progress=False))[0]
        Sequential(
          (0): Linear(in_features=16, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=8, bias=True)
        )
    """
    adaptation = require(model)
    if len(adaptation.adapters) > 1:
        raise Incompatible(
            f"the model holds the adapters {', '.join(sorted(adaptation.adapters))}; remove all but the "
            "compressed weights first"
        )
    layers = dict(adaptation.layers)
    pairs = {path: _pair(path, layer) for path, layer in layers.items()}
    _leave(model, adaptation)
    for path, pair in pairs.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, pair.train(layers[path].training))
        adaptation.inference_path.avoid(model, path)
    return model


def _leave(model: nn.Module, adaptation: Adaptation) -> None:
    """Take the adapter out of a model that its layers leave too."""
    for name in list(adaptation.adapters):
        adaptation.base_values.update(adaptation.whole(name))
        adaptation.adapters[name].scratch = False
        adaptation.remove(name)


def _pair(path: str, layer: StructuredLayer) -> nn.Sequential:
    """Return the two layers that take the place of one."""
    if layer.lender is not None:
        raise UnsupportedLayer(f"{path} shares its weight with another layer, which two layers would part")
    if layer.materialised:
        raise UnsupportedLayer(
            f"{path} is read by nn.MultiheadAttention without being called, so no two layers can stand there"
        )
    found = _factors(layer)
    if found is None:
        what = "a plain weight" if layer.expression is None else layer.expression.formula()
        raise UnsupportedLayer(f"{path} is {what}, not a product of two factors")
    up, down = found
    bias = layer._parameters.get("bias")
    if isinstance(layer, StructuredEmbedding):
        return _embedding_pair(layer, up, down)
    if isinstance(layer, StructuredConv):
        return _convolution_pair(layer, up, down, bias)
    return nn.Sequential(_linear(down, None), _linear(up, bias))


def _factors(layer: StructuredLayer) -> tuple[Tensor, Tensor] | None:
    """Return up (out, r) and down (r, in) of a layer whose weight they are, or None."""
    expression = layer.expression
    if expression is None or not layer.is_released:
        return None
    found = expression.factored()
    return None if found is None else (found[0].detach(), found[1].detach())


def _linear(matrix: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(matrix.contiguous())
    if bias is not None:
        made.bias = bias
    return made


def _embedding_pair(layer: Any, up: Tensor, down: Tensor) -> nn.Sequential:
    first = nn.Embedding(
        up.shape[0], up.shape[1], padding_idx=layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq,
        sparse=layer.sparse, device="meta",
    )  # fmt: skip
    first.weight = nn.Parameter(up.contiguous())
    return nn.Sequential(first, _linear(down.T, None))


def _convolution_pair(layer: Any, up: Tensor, down: Tensor, bias: nn.Parameter | None) -> nn.Sequential:
    kind, groups, inner = type(layer.original), layer.groups, layer.groups * down.shape[0]
    ones = (1,) * len(layer.kernel_size)
    first = kind(
        layer.in_channels, inner, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups,
        bias=False, padding_mode=layer.padding_mode, device="meta",
    )  # fmt: skip
    first.weight = nn.Parameter(down.repeat(groups, 1).reshape(first.weight.shape).contiguous())
    second = kind(inner, layer.out_channels, ones, groups=groups, bias=bias is not None, device="meta")
    second.weight = nn.Parameter(up.reshape(*up.shape, *ones).contiguous())
    if bias is not None:
        second.bias = bias
    return nn.Sequential(first, second)


# On disk ----------------------------------------------------------------------------------------------


def save_dense(model: PreTrainedModel, folder: Path) -> None:
    """Multiply the factors out and write a stock model of the size that it had.

    Raises:
        NotDense: a weight of it is no matrix.
    """
    from ..layers import fold

    if adaptation_of(model) is not None:
        fold(model)
    model.save_pretrained(folder)


def save_layers(model: PreTrainedModel, folder: Path) -> None:
    """Write a compressed model as plain layers, with the code that transformers builds it from.

    The folder loads with `from_pretrained(folder, trust_remote_code=True)`, without Rankfold. The model has a
    type of its own, so that nothing takes it for the stock model and starts weights anew.

    Args:
        model: compressed; changed in place, see `unfold`.
        folder: to write into.

    Raises:
        UnsupportedLayer: as `unfold`, or the model's class is not one of transformers.
    """
    kind, automatic = type(model), automatic_classes(type(model))
    places = list(require(model).layers)
    unfold(model)
    pairs = {path: _facts(model.get_submodule(path)) for path in places}
    model.save_pretrained(folder)
    write_text(folder / f"{MODULE}.py", _code(kind))
    settings = read_json(folder / "config.json")
    name = f"Factored{kind.__name__}"
    entries = {"AutoConfig": f"{MODULE}.FactoredConfig", **dict.fromkeys(automatic, f"{MODULE}.{name}")}
    write_json(
        folder / "config.json",
        {
            **settings,
            "architectures": [name],
            "auto_map": entries,
            "factored": pairs,
            "model_type": f"factored-{settings['model_type']}",
        },
    )


def _facts(pair: nn.Module) -> dict[str, Any]:
    """Return what, beside the stock layer, the shape of a pair follows from."""
    first: Any
    second: Any
    first, second = pair.children()
    inner = first.weight.shape[1 if isinstance(first, nn.Embedding) else 0]
    return {"rank": inner // getattr(first, "groups", 1), "bias": second.bias is not None}


def automatic_classes(kind: type) -> list[str]:
    """Return the names of transformers' automatic classes under which a class of models is known.

    Raises:
        UnsupportedLayer: the class is not one of transformers.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if getattr(transformers, kind.__name__, None) is not kind:
        raise UnsupportedLayer(f"{kind.__name__} is no class of transformers, from which code could derive")
    mappings = {
        name: getattr(modeling_auto, name)._model_mapping
        for name in dir(modeling_auto)
        if name.startswith("AutoModel") and hasattr(getattr(modeling_auto, name), "_model_mapping")
    }
    found = [name for name, mapping in mappings.items() if kind.__name__ in _class_names(mapping)]
    return sorted(found) or ["AutoModel"]


def _class_names(mapping: Any) -> set[str]:
    """Return the names of the classes in a lazy mapping, none of which is imported."""
    names: set[str] = set()
    for value in mapping._model_mapping.values():
        names.update([value] if isinstance(value, str) else value)
    return names


def _code(kind: type[nn.Module]) -> str:
    """Return the module that builds a model of a stock class with two layers in some places."""
    config = kind.config_class.__name__  # type: ignore[attr-defined]
    return _TEMPLATE.replace("STOCK_MODEL", kind.__name__).replace("STOCK_CONFIG", config)


_TEMPLATE = '''"""STOCK_MODEL with two layers in the place of each weight that `config.factored` names."""

from torch import nn
from transformers import STOCK_CONFIG, STOCK_MODEL


class FactoredConfig(STOCK_CONFIG):
    model_type = f"factored-{STOCK_CONFIG.model_type}"


class FactoredSTOCK_MODEL(STOCK_MODEL):
    config_class = FactoredConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for path, facts in config.factored.items():
            parent, _, name = path.rpartition(".")
            layer = self.get_submodule(path)
            setattr(self.get_submodule(parent), name, pair(layer, **facts))


def pair(layer, rank, bias):
    """Return two layers of the shape of one, with `rank` channels between them; their values are loaded."""
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Embedding):
        first = nn.Embedding(layer.num_embeddings, rank, padding_idx=layer.padding_idx, **place)
        return nn.Sequential(first, nn.Linear(rank, layer.embedding_dim, bias=False, **place))
    if hasattr(layer, "kernel_size"):
        inner = rank * layer.groups
        kept = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        mode = {"padding_mode": layer.padding_mode}
        first = type(layer)(layer.in_channels, inner, *kept, bias=False, **mode, **place)
        second = type(layer)(inner, layer.out_channels, 1, groups=layer.groups, bias=bias, **place)
        return nn.Sequential(first, second)
    out, columns = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
    first = nn.Linear(columns, rank, bias=False, **place)
    return nn.Sequential(first, nn.Linear(rank, out, bias=bias, **place))
'''
