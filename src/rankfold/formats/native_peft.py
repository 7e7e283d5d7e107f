"""Methods beside LoRA, DoRA and VeRA that peft stores in a form of their own, out and in.

One entry per method says which leaf has which name on disk, how it is turned to its shape there, and what
the configuration must say. Before a file is written, the map that peft makes of it is compared with the
expression, weight by weight, so that a gate, a start or a moved base can never be lost: what differs is no
such file.

Only plain linear layers are written: of convolutions and transposed layers peft's methods are other maps or
none. There is no exact file either of LoKr with a factor that no one setting gives, OFT with several block
sizes, BOFT of several factors or with a scale, of methods without ranks per layer where ranks differ, and of
RandLoRA, whose bases and diagonals peft pairs in another order, one that differs with a layer's size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FormatError, Incompatible
from ..layers import StructuredConv, StructuredEmbedding, StructuredLayer, StructuredTransposedLinear
from ..weights import Scaled, Sum, Weight
from .files import read_json, read_tensors, write_json, write_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_CLOSE = 1e-5  # largest difference of peft's map and the expression, relative to the largest change
_ROUNDING = 32  # and in units of the last place of the weight's largest entry
Leaves = Mapping[str, Tensor]


@dataclass
class Native:
    """An adapter of one of these methods.

    Attributes:
        kind: peft's name of the method.
        layers: leaves by path and name, as the expressions of the structure have them.
        ranks: by path; None where the method has none.
        settings: fields of the configuration that the method has.
        whole: tensors of modules trained whole, by parameter name.
        options: further fields of the configuration.
    """

    kind: str
    layers: dict[str, dict[str, Tensor]]
    ranks: dict[str, int | None]
    settings: dict[str, Any]
    whole: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """How peft stores a method.

    Attributes:
        structure: that reads the file.
        names: on disk of every leaf that a layer may have.
        settings: of an adapter, or None where the configuration cannot say it.
        matrix: the weight that peft forms, from W0, the leaves and the settings.
        options: of the structure, from the configuration.
        rank: of a layer, from its leaves and the configuration; None where the method has none.
        turned: leaves that are transposed on disk.
        fixed: fields that have to have these values for the file to be read.
    """

    structure: str
    names: Mapping[str, str]
    settings: Callable[[Native], dict[str, Any] | None]
    matrix: Callable[[Tensor, Leaves, Mapping[str, Any]], Tensor]
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    rank: Callable[[Leaves, Mapping[str, Any]], int | None]
    turned: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


# Settings ---------------------------------------------------------------------------------------------


def _one_rank(native: Native) -> dict[str, Any] | None:
    ranks = set(native.ranks.values())
    return {"r": ranks.pop()} if len(ranks) == 1 else None


def _scaled_ranks(native: Native) -> dict[str, Any]:
    """Return ranks and alphas, patterns where layers differ; alpha is rank times the scale of a layer."""
    ranks = {path: int(rank or 0) for path, rank in native.ranks.items()}
    alphas = {path: native.settings["scales"][path] * rank for path, rank in ranks.items()}
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    return {"r": rank, "rank_pattern": rank_pattern, "alpha": alpha, "alpha_pattern": alpha_pattern}


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value, and the others by a pattern of their paths."""
    most = max(sorted(set(values.values())), key=list(values.values()).count)
    return most, {_pattern(path): value for path, value in sorted(values.items()) if value != most}


def _pattern(path: str) -> str:
    return f"^{re.escape(path)}"


def _kronecker(native: Native) -> dict[str, Any] | None:
    """Return a factor by which peft arrives at the shapes of every layer, or None."""
    split = any("up1" in leaves for leaves in native.layers.values())
    factors = [-1, *sorted({_kronecker_shapes(leaves)[0] for leaves in native.layers.values()})]
    for factor in factors:
        if all(_agrees(native, path, factor, split) for path in native.layers):
            return {**_scaled_ranks(native), "decompose_factor": factor, "decompose_both": split}
    return None


def _kronecker_shapes(leaves: Leaves) -> tuple[int, int, int, int]:
    """Return a, b of the first factor and c, d of the second one."""
    return (*_sides(leaves, "first", "up1", "down1"), *_sides(leaves, "second", "up", "down"))


def _sides(leaves: Leaves, whole: str, up: str, down: str) -> tuple[int, int]:
    """Return the shape of a factor that is one matrix or a product of two."""
    if whole in leaves:
        return leaves[whole].shape[0], leaves[whole].shape[1]
    return leaves[up].shape[0], leaves[down].shape[1]


def _agrees(native: Native, path: str, factor: int, split: bool) -> bool:
    """Say whether peft would build these factors for a layer."""
    leaves, rank = native.layers[path], int(native.ranks[path] or 0)
    a, b, c, d = _kronecker_shapes(leaves)
    shapes = _divided(a * c, factor) == (a, c) and _divided(b * d, factor) == (b, d)
    first = ("up1" in leaves) == (split and 2 * rank < max(a, b))
    return shapes and first and ("up" in leaves) == (2 * rank < max(c, d))


def _divided(size: int, factor: int) -> tuple[int, int]:
    """Return the two sizes into which peft divides one: by the factor, or near to the root within it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = math.isqrt(size) if factor == -1 else min(math.isqrt(size), factor)
    small = max(d for d in range(1, max(bound, 1) + 1) if size % d == 0)
    return small, size // small


def _rotations(native: Native) -> dict[str, Any] | None:
    """Return the one block size, or the one number of blocks."""
    blocks = {leaves["skew"].shape[0] for leaves in native.layers.values()}
    sizes = {_side(leaves["skew"].shape[1]) for leaves in native.layers.values()}
    exact = {"use_cayley_neumann": False}
    if len(sizes) == 1:
        return {"r": 0, "oft_block_size": sizes.pop(), **exact}
    return {"r": blocks.pop(), "oft_block_size": 0, **exact} if len(blocks) == 1 else None


def _side(entries: int) -> int:
    """Return b of b (b - 1) / 2 entries above a diagonal."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


def _grid(native: Native) -> dict[str, Any] | None:
    ranks = {leaves["up"].shape[2] for leaves in native.layers.values()}
    grids = {leaves["up"].shape[0] for leaves in native.layers.values()}
    plain = {leaves["plain.up"].shape[1] if "plain.up" in leaves else 0 for leaves in native.layers.values()}
    scales = set(native.settings["scales"].values())
    if any(len(found) > 1 for found in (ranks, grids, plain, scales)):
        return None
    rank, hybrid = ranks.pop(), plain.pop()
    alpha = scales.pop() * (rank + hybrid)
    return {"r": rank, "hybrid_r": hybrid, "gralora_k": grids.pop(), "alpha": alpha}


# Maps -------------------------------------------------------------------------------------------------


def _entrywise(base: Tensor, leaves: Leaves, settings: Mapping[str, Any]) -> Tensor:
    return base + float(settings["scale"]) * (leaves["up1"] @ leaves["down1"]) * (
        leaves["up"] @ leaves["down"]
    )


def _kron(base: Tensor, leaves: Leaves, settings: Mapping[str, Any]) -> Tensor:
    first = leaves["first"] if "first" in leaves else leaves["up1"] @ leaves["down1"]
    second = leaves["second"] if "second" in leaves else leaves["up"] @ leaves["down"]
    return base + float(settings["scale"]) * torch.kron(first.contiguous(), second.contiguous())


def _reflected(base: Tensor, leaves: Leaves, settings: Mapping[str, Any]) -> Tensor:
    for vector in F.normalize(leaves["vectors"], dim=0).unbind(1):
        base = base - 2 * torch.outer(base @ vector, vector)
    return base


def _modulated(base: Tensor, leaves: Leaves, settings: Mapping[str, Any]) -> Tensor:
    return base * (1 + leaves["up"] @ leaves["down"])


def _repeated(base: Tensor, leaves: Leaves, settings: Mapping[str, Any]) -> Tensor:
    shard = leaves["shard"]
    return base + shard[:, torch.arange(base.shape[1]) % shard.shape[1]]


def _blockwise(base: Tensor, leaves: Leaves, settings: Mapping[str, Any]) -> Tensor:
    rank = leaves["blocks"].shape[1]
    shards = base.unflatten(0, (-1, rank)).unflatten(2, (-1, rank)).transpose(1, 2)  # (i, j, rank, rank)
    blocks = leaves["blocks"][:, None]
    change: Tensor = (shards @ blocks + blocks).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return base + change


def _rotated(base: Tensor, leaves: Leaves, settings: Mapping[str, Any]) -> Tensor:
    entries = leaves["skew"]
    side = _side(entries.shape[1])
    rows, columns = torch.triu_indices(side, side, 1)
    skew = entries.new_zeros(len(entries), side, side)
    skew[:, rows, columns] = entries
    skew = skew - skew.transpose(1, 2)
    eye = torch.eye(side).to(skew)
    rotation: Tensor = torch.block_diag(*torch.linalg.solve(eye - skew, eye + skew))
    return base @ rotation


def _gridded(base: Tensor, leaves: Leaves, settings: Mapping[str, Any]) -> Tensor:
    up, down = leaves["up"], leaves["down"]
    k = len(up)
    blocks = torch.einsum("jonq,njqi->jnoi", up.unflatten(2, (k, -1)), down.unflatten(1, (k, -1)))
    change = blocks.transpose(1, 2).reshape(base.shape)
    if "plain.up" in leaves:
        change = change + leaves["plain.up"] @ leaves["plain.down"]
    return base + float(settings["scale"]) * change


# Reading ----------------------------------------------------------------------------------------------


def _nothing(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _alpha(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"alpha": settings.get("alpha", 8)}


def _kronecker_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    factor = settings.get("decompose_factor", -1)
    return {**_alpha(settings), "factor": factor, "decompose_both": bool(settings.get("decompose_both"))}


def _grid_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**_alpha(settings), "k": settings.get("gralora_k", 2), "hybrid_rank": settings.get("hybrid_r", 0)}


def _no_rank(leaves: Leaves, settings: Mapping[str, Any]) -> None:
    return None


def _columns(leaf: str) -> Callable[[Leaves, Mapping[str, Any]], int]:
    return lambda leaves, settings: int(leaves[leaf].shape[-1])


def _set_rank(leaves: Leaves, settings: Mapping[str, Any]) -> int:
    return int(settings["r"])


METHODS: dict[str, Method] = {
    "LOHA": Method(
        "loha",
        {"up1": "hada_w1_a", "down1": "hada_w1_b", "up": "hada_w2_a", "down": "hada_w2_b"},
        _scaled_ranks, _entrywise, _alpha, _columns("up"),
    ),
    "LOKR": Method(
        "lokr",
        {
            "first": "lokr_w1", "up1": "lokr_w1_a", "down1": "lokr_w1_b",
            "second": "lokr_w2", "up": "lokr_w2_a", "down": "lokr_w2_b",
        },
        _kronecker, _kron, _kronecker_options, _set_rank,
    ),
    "HRA": Method(
        "hra", {"vectors": "hra_u"}, _one_rank, _reflected, _nothing, _columns("vectors"),
        fixed={"apply_GS": False},
    ),
    "HIRA": Method(
        "hira", {"up": "hira_B", "down": "hira_A"}, _one_rank, _modulated, _nothing, _columns("up")
    ),
    "MISS": Method(
        "miss", {"shard": "miss_block"}, _one_rank, _repeated, _nothing, _columns("shard"),
        turned=("shard",), fixed={"init_weights": True},
    ),
    "BAT": Method(
        "bone", {"blocks": "miss_block"}, _one_rank, _blockwise, _nothing, _columns("blocks"),
        fixed={"init_weights": "bat"},
    ),
    "OFT": Method(
        "oft", {"skew": "oft_R.weight"}, _rotations, _rotated,
        lambda settings: {"block_size": settings["oft_block_size"] or 10**9}, _no_rank,
        fixed={"use_cayley_neumann": False, "coft": False, "block_share": False},
    ),
    "GRALORA": Method(
        "gralora",
        {
            "up": "gralora_B", "down": "gralora_A",
            "plain.up": "gralora_B_general.weight", "plain.down": "gralora_A_general.weight",
        },
        _grid, _gridded, _grid_options, _columns("up"), turned=("up", "down"),
    ),
}  # fmt: skip
_OF_STRUCTURE = {
    "loha": "LOHA", "abba": "LOHA", "lokr": "LOKR", "hra": "HRA", "hira": "HIRA", "miss": "MISS",
    "bone": "BAT", "oft": "OFT", "boft": "OFT", "gralora": "GRALORA",
}  # fmt: skip
_ONE_FACTOR = {"skew0": "skew"}  # a butterfly of one factor is a block rotation
_SCALED_LEAVES = ("up1", "first")  # of those methods whose scale may differ from layer to layer


# Out --------------------------------------------------------------------------------------------------


def is_plain(layer: StructuredLayer) -> bool:
    """Say whether a layer is a linear layer as `nn.Linear` is."""
    return not isinstance(layer, StructuredEmbedding | StructuredConv | StructuredTransposedLinear)


@torch.no_grad()
def found(
    record: Mapping[str, Any],
    expressions: Mapping[str, Weight],
    layers: Mapping[str, StructuredLayer],
) -> Native | None:
    """Return an adapter in its own method of peft, or None where that would not be the same map.

    Args:
        record: of the adapter.
        expressions: of its weights.
        layers: plain linear layers.
    """
    kind = _OF_STRUCTURE.get(str(record.get("recipe", {}).get("structure", [""])[0]))
    if kind is None:
        return None
    method, native = METHODS[kind], Native(kind, {}, {}, {"scales": {}})
    for path, expression in expressions.items():
        leaves = _leaves(expression, method)
        if leaves is None:
            return None
        native.layers[path] = leaves
        native.ranks[path] = method.rank(leaves, {"r": record["ranks"][path] or 0})
        native.settings["scales"][path] = _scale(expression)
    settings = method.settings(native)
    same = (_is_same(native, path, e, layers[path]) for path, e in expressions.items())
    if settings is None or not all(same):
        return None
    native.settings = settings
    return native


def _leaves(expression: Weight, method: Method) -> dict[str, Tensor] | None:
    """Return the leaves that are stored for a layer, or None where the expression has others, too."""
    result = {}
    for leaf in expression.leaves():
        name = _ONE_FACTOR.get(leaf.name, leaf.name)
        if leaf.name == "W0" or name.endswith(".rotations"):
            continue
        if name not in method.names:
            return None
        result[name] = leaf.tensor().detach()
    return result


def _scale(expression: Weight) -> float:
    """Return the factor before the change of a sum; 1 for other maps."""
    terms = list(expression.parts()) if isinstance(expression, Sum) else []
    return float(terms[1].factor()) if len(terms) > 1 and isinstance(terms[1], Scaled) else 1.0


def _is_same(native: Native, path: str, expression: Weight, layer: StructuredLayer) -> bool:
    """Say whether peft's map of a layer's leaves is the expression."""
    base = layer.matrix().detach()
    dtype = torch.promote_types(base.dtype, torch.float32)
    leaves = {name: value.to(dtype) for name, value in native.layers[path].items()}
    settings = {"scale": native.settings["scales"][path]}
    wanted = expression.dense().to(dtype)
    try:
        got = METHODS[native.kind].matrix(base.to(dtype), leaves, settings)
    except (RuntimeError, KeyError):  # leaves of other shapes than the method's
        return False
    if got.shape != wanted.shape:
        return False
    change, size = (float(part.abs().max()) for part in (wanted - base.to(dtype), wanted))
    allowed = _CLOSE * change + _ROUNDING * torch.finfo(dtype).eps * size
    return float((got - wanted).abs().max()) <= allowed


def write(folder: Path, native: Native) -> None:
    """Write configuration and tensors into a folder that exists."""
    method, result = METHODS[native.kind], {}
    for path, leaves in native.layers.items():
        for leaf, value in leaves.items():
            result[f"{_PREFIX}{path}.{method.names[leaf]}"] = value.mT if leaf in method.turned else value
    result |= {f"{_PREFIX}{key}": value for key, value in native.whole.items()}
    write_tensors(folder / TENSORS, result)
    write_json(folder / CONFIG, config(native))


def config(native: Native) -> dict[str, Any]:
    """Return the configuration as it is on disk."""
    return {
        "peft_type": peft_type(native.kind),
        "target_modules": sorted(native.layers),
        "inference_mode": True,
        "modules_to_save": None,
        **METHODS[native.kind].fixed,
        **native.settings,
        **native.options,
    }


def peft_type(kind: str) -> str:
    """Return the type under which peft keeps a method."""
    return "MISS" if kind == "BAT" else kind


# In ---------------------------------------------------------------------------------------------------

_HARMLESS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_weights",
    "rank_dropout", "module_dropout", "rank_dropout_scale", "decompose_factor", "decompose_both",
    "hira_dropout", "miss_dropout", "mini_r", "oft_block_size", "eps", "num_cayley_neumann_terms",
    "gralora_k", "hybrid_r", "gralora_dropout",
}  # fmt: skip


def reads(settings: Mapping[str, Any]) -> bool:
    """Say whether a configuration is of one of these methods."""
    return settings.get("peft_type") in [peft_type(kind) for kind in METHODS]


def read(folder: Path) -> Native:
    """Read a peft folder of one of these methods.

    Raises:
        FormatError: it is truncated, or its tensors are not those of its configuration.
        Incompatible: it uses a feature that would be lost.
    """
    settings = read_json(folder / CONFIG)
    kind = str(settings["peft_type"])
    if kind == "MISS" and settings.get("init_weights") == "bat":
        kind = "BAT"
    method = METHODS[kind]
    _refuse_lost(folder, method, settings)
    native = Native(kind, {}, {}, dict(settings))
    try:
        _sort(native, method, read_tensors(folder / TENSORS))
        native.ranks = {path: method.rank(leaves, settings) for path, leaves in native.layers.items()}
        _fold_scales(native)
    except FormatError as error:
        raise FormatError(f"{folder} {error}") from None
    except Incompatible:
        raise
    except Exception as error:  # whatever a changed file makes of shapes and types
        raise FormatError(f"{folder / CONFIG} does not describe its tensors: {error!r}") from None
    return native


def _refuse_lost(folder: Path, method: Method, settings: Mapping[str, Any]) -> None:
    for key, value in method.fixed.items():
        if settings.get(key, value) != value and not (key == "init_weights" and settings[key] is False):
            raise Incompatible(f"{folder} uses {key}={settings[key]!r}, another map than is read")
    for key, value in settings.items():
        if key not in _HARMLESS and key not in method.fixed and value not in (None, False, "none", [], {}):
            raise Incompatible(f"{folder} uses {key}={value!r}, which would be lost")
    if method.structure == "oft" and "use_cayley_neumann" not in settings:
        raise Incompatible(
            f"{folder} rotates by a cut series, which is no rotation; it cannot be read exactly"
        )


def _sort(native: Native, method: Method, found: Mapping[str, Tensor]) -> None:
    """Put every tensor in its place."""
    whole = tuple(native.settings.get("modules_to_save") or ())
    for name, value in found.items():
        place = _place(name, method)
        if place is not None:
            leaf = value.mT.contiguous() if place[1] in method.turned else value
            native.layers.setdefault(place[0], {})[place[1]] = leaf
        elif any(f".{module}." in f".{name.removeprefix(_PREFIX)}" for module in whole):
            native.whole[name.removeprefix(_PREFIX)] = value
        else:
            raise FormatError(f"holds {name}, which is no part of a {peft_type(native.kind)} adapter")
    if not native.layers:
        raise FormatError("holds no adapted layer")


def _place(name: str, method: Method) -> tuple[str, str] | None:
    for leaf, suffix in method.names.items():
        if name.startswith(_PREFIX) and name.endswith(f".{suffix}"):
            return name[len(_PREFIX) : -len(suffix) - 1], leaf
    return None


def _fold_scales(native: Native) -> None:
    """Multiply scales that differ from layer to layer into a leaf, and give every layer the scale 1."""
    settings = native.settings
    ranks, patterns = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    if not ranks and not patterns:
        return
    for path, leaves in native.layers.items():
        rank = _matched(ranks, path, settings.get("r", 8))
        if native.kind == "LOKR":
            native.ranks[path] = int(rank)
        leaf = next((name for name in _SCALED_LEAVES if name in leaves), None)
        if leaf is not None:
            leaves[leaf] = leaves[leaf] * (_matched(patterns, path, settings.get("alpha", 8)) / rank)
    settings["alpha"] = None


def _matched(patterns: Mapping[str, Any], path: str, default: float) -> float:
    """Return what peft takes for a path: the value of the first pattern that is its end."""
    return float(next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default))


def options_of(native: Native) -> dict[str, Any]:
    """Return the options of the structure that reads an adapter."""
    return METHODS[native.kind].options(native.settings)
