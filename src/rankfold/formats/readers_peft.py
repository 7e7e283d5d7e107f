"""Folders of peft, as the exact low-rank changes that they mean.

LORA     s B A,  s = alpha / r or alpha / sqrt(r); with a magnitude, m (W0 + s B A) / |W0 + s B A| - W0
VERA     diag(b) B diag(d) A, cut from the shared pair
LOHA     s (B1 A1) * (B2 A2)
LOKR     s W1 (x) W2
ADALORA  s B diag(E) A,  s = alpha / (init_r + 1e-5), whatever ranks were left
GRALORA  s times k x k blocks, and s B A of its hybrid part,  s = alpha / (r + hybrid_r)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, Incompatible, RankfoldError
from . import peft
from .changes import Changes
from .files import read_json, read_tensors
from .readers_files import check_finite, pair_of, pattern_value
from .readers_model import Places
from .readers_pairs import Pair, decomposed, granular, smallest, wide

_PREFIX = "base_model.model."
_COMMON = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "r", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "init_weights", "runtime_config",
}  # fmt: skip
# Per kind: the fields that may be set beside those, and the names of its leaves.
_FIELDS = {
    "LOHA": {"alpha", "rank_dropout", "module_dropout", "use_effective_conv2d"},
    "LOKR": {
        "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "decompose_both",
        "decompose_factor", "rank_dropout_scale",
    },
    "ADALORA": {
        "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
        "total_step", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "megatron_core",
        "qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying",
    },
    "GRALORA": {"alpha", "hybrid_r", "gralora_k", "gralora_dropout", "fan_in_fan_out"},
}  # fmt: skip
_LEAVES = {
    "LOHA": {
        "hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b",
        "hada_t1": "t1", "hada_t2": "t2",
    },
    "LOKR": {
        "lokr_w1": "k1", "lokr_w1_a": "k1_a", "lokr_w1_b": "k1_b",
        "lokr_w2": "k2", "lokr_w2_a": "k2_a", "lokr_w2_b": "k2_b", "lokr_t2": "kt",
    },
    "ADALORA": {"lora_A": "down", "lora_B": "up", "lora_E": "values"},
    "GRALORA": {
        "gralora_A": "down", "gralora_B": "up", "gralora_A_general.weight": "plain_down",
        "gralora_B_general.weight": "plain_up",
    },
}  # fmt: skip
_UNSET: tuple[Any, ...] = (None, False, "none", [], {})
Leaves = Mapping[str, Tensor]
Settings = Mapping[str, Any]


def read_folder(folder: Path, model: nn.Module | None) -> Changes:
    """Read a peft folder.

    Raises:
        FormatError: it is truncated, or its tensors are not those of its configuration.
        Incompatible: it is of a method that no low-rank pair can hold, uses a feature that would be lost, or
            means something only beside its base.
    """
    settings = read_json(folder / peft.CONFIG)
    places = Places(model) if model is not None else None
    kind = settings.get("peft_type")
    if kind in ("LORA", "VERA"):
        return _plain(folder, settings, places)
    if not isinstance(kind, str) or kind not in _LEAVES:
        raise Incompatible(
            f"{folder} holds a peft adapter of type {kind!r}; as low-rank changes LORA, VERA, "
            f"{', '.join(_LEAVES)} are read"
        )
    _refuse_lost(settings, kind, folder)
    try:
        return _other(settings, kind, read_tensors(folder / peft.TENSORS))
    except FormatError as error:
        raise FormatError(f"{folder}: {error}") from None
    except RankfoldError:
        raise
    except Exception as error:  # whatever a changed file makes of shapes and types
        raise FormatError(f"{folder / peft.CONFIG} does not describe its tensors: {error!r}") from None


def _base_name(settings: Settings) -> str:
    return str(settings.get("base_model_name_or_path") or "")


# LoRA, DoRA and VeRA -----------------------------------------------------------------------------------


def _plain(folder: Path, settings: Settings, places: Places | None) -> Changes:
    adapter = peft.read(folder)
    for path, leaves in adapter.layers.items():
        for leaf, tensor in leaves.items():
            check_finite(f"{folder}: {path}.{leaf}", tensor)
    for key, tensor in {**adapter.shared, **adapter.whole}.items():
        check_finite(f"{folder}: {key}", tensor)
    pair = _vera_pair if adapter.kind == "VERA" else _lora_pair
    try:
        pairs = {path: pair(adapter, path, places) for path in adapter.layers}
    except FormatError as error:
        raise FormatError(f"{folder} {error}") from None
    except RuntimeError as error:
        raise FormatError(f"{folder} holds tensors that do not belong together: {error}") from None
    return Changes(
        pairs,
        adapter.kinds,
        {path: window for path, window in adapter.windows.items() if window},
        adapter.whole,
        _base_name(settings),
        f"peft {adapter.kind}",
    )


def _lora_pair(adapter: peft.PeftAdapter, path: str, places: Places | None) -> Pair:
    leaves, scale = adapter.layers[path], adapter.alphas[path] / max(1, adapter.rank(path))
    up, down = wide(leaves["up"]) * scale, wide(leaves["down"])
    if "magnitude" not in leaves:
        return up, down
    if places is None:
        raise Incompatible(f"{path} is a DoRA, whose change depends on the base weight; pass model=")
    weight = places.matrix(path)
    change = (up @ down).to(weight.device)
    magnitude = leaves["magnitude"].to(weight.device)
    return decomposed(weight, change, magnitude, columns=adapter.kinds[path] == "embedding")


def _vera_pair(adapter: peft.PeftAdapter, path: str, places: Places | None) -> Pair:
    if places is None:
        raise Incompatible(f"a VeRA of peft does not tell how wide {path} is; pass model=")
    rows, columns = places.layer(path).shape
    b, d = (wide(adapter.layers[path][leaf]) for leaf in ("b", "d"))
    up, down = (wide(adapter.shared[key]) for key in ("up", "down"))
    if b.shape != (rows,) or up.shape[0] < rows or down.shape[1] < columns:
        raise FormatError(f"holds a VeRA of {path} for another shape than {rows}x{columns}")
    return b[:, None] * up[:rows, : len(d)] * d, down[: len(d), :columns]


# The others -------------------------------------------------------------------------------------------


def _refuse_lost(settings: Settings, kind: str, folder: Path) -> None:
    for key, value in settings.items():
        if key not in _COMMON | _FIELDS[kind] and value not in _UNSET:
            raise Incompatible(f"{folder} uses {key}={value!r}, which would be lost")


def _other(settings: Settings, kind: str, found: Mapping[str, Tensor]) -> Changes:
    whole_modules = tuple(settings.get("modules_to_save") or ())
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in found.items():
        check_finite(key, tensor)
        name = key.removeprefix(_PREFIX)
        place = _place(name, kind)
        if place is not None:
            layers.setdefault(place[0], {})[place[1]] = tensor
        elif any(f".{module}." in f".{name}" for module in whole_modules):
            whole[name] = tensor
        else:
            raise FormatError(f"it holds {key}, which is no part of a {kind} adapter")
    if not layers:
        raise FormatError("it holds no adapted layer")
    pairs: dict[str, Pair] = {}
    windows: dict[str, tuple[int, ...]] = {}
    for path, leaves in layers.items():
        try:
            pairs[path], window = _BUILDERS[kind](leaves, path, settings)
        except FormatError as error:
            raise FormatError(f"{path} {error}") from None
        windows |= {path: window} if window else {}
    kinds = dict.fromkeys(windows, "convolution")
    return Changes(pairs, kinds, windows, whole, _base_name(settings), f"peft {kind}")


def _place(name: str, kind: str) -> tuple[str, str] | None:
    for suffix, leaf in _LEAVES[kind].items():
        if name.endswith(f".{suffix}"):
            return name[: -len(suffix) - 1], leaf
    return None


def _lycoris(leaves: Leaves, path: str, settings: Settings) -> tuple[Pair, tuple[int, ...]]:
    alpha = _number(pattern_value(settings.get("alpha_pattern"), path, settings.get("alpha", 8)), "alpha")
    rank = _number(pattern_value(settings.get("rank_pattern"), path, settings.get("r", 8)), "rank")
    if rank < 1:
        raise FormatError(f"has the impossible rank {rank}")
    return pair_of(leaves, alpha / rank)


def _adalora(leaves: Leaves, path: str, settings: Settings) -> tuple[Pair, tuple[int, ...]]:
    _need(leaves, {"up", "down", "values"})
    start = _number(settings.get("init_r", 12), "init_r")
    alpha = _number(settings.get("lora_alpha", 8), "lora_alpha")
    up, down, values = (wide(leaves[leaf]) for leaf in ("up", "down", "values"))
    if up.dim() != 2 or down.dim() != 2 or values.numel() != down.shape[0]:
        raise FormatError("has factors and values of different ranks")
    if not len(values):  # all of its rank went to other weights
        return (up.new_zeros(len(up), 1), down.new_zeros(1, down.shape[1])), ()
    scale = (alpha if alpha > 0 else start) / (start + 1e-5)
    return smallest(up * scale, values.reshape(-1, 1) * down), ()


def _gralora(leaves: Leaves, path: str, settings: Settings) -> tuple[Pair, tuple[int, ...]]:
    _need(leaves, {"up", "down"})
    hybrid = "plain_up" in leaves
    if hybrid != ("plain_down" in leaves):
        raise FormatError("has one factor of its hybrid part without the other")
    if leaves["up"].dim() != 3 or leaves["down"].dim() != 3:
        raise FormatError("has blocks that are no stacks of matrices")
    up, down = granular(wide(leaves["down"]), wide(leaves["up"]))
    alpha, rank = _number(settings.get("alpha", 64), "alpha"), leaves["down"].shape[2]
    if hybrid:
        up = torch.cat([up, wide(leaves["plain_up"])], 1)
        down = torch.cat([down, wide(leaves["plain_down"])], 0)
        rank += leaves["plain_down"].shape[0]
    return smallest(up * (alpha / max(1, rank)), down), ()


def _need(leaves: Leaves, names: set[str]) -> None:
    lacking = sorted(names - set(leaves))
    if lacking:
        raise FormatError(f"lacks its {lacking[0]}")


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e300:
        raise FormatError(f"has {name}={str(value)[:20]!r}, which is no number")
    return float(value) if not math.isnan(value) else 0.0


_BUILDERS: dict[str, Callable[[Leaves, str, Settings], tuple[Pair, tuple[int, ...]]]] = {
    "LOHA": _lycoris, "LOKR": _lycoris, "ADALORA": _adalora, "GRALORA": _gralora,
}  # fmt: skip
