"""The peft adapter format: LoRA, DoRA and VeRA, in and out.

One map per layer kind says which leaf has which name and shape on disk; it is read in both directions, so
writing and reading cannot drift apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FormatError, Incompatible
from .files import read_json, read_tensors, write_json, write_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LEAVES = {
    "linear": {"up": "lora_B.weight", "down": "lora_A.weight", "magnitude": "lora_magnitude_vector"},
    "embedding": {"up": "lora_embedding_A", "down": "lora_embedding_B", "magnitude": "lora_magnitude_vector"},
    "vera": {"b": "vera_lambda_b", "d": "vera_lambda_d"},
}
_LEAVES["convolution"] = _LEAVES["linear"]
_SHARED = {"up": "base_model.vera_B", "down": "base_model.vera_A"}
# The fields that say nothing of the tensors' meaning, or that are read. Any other field, also one of a later
# version, must be unset, for what it says would be lost.
_HARMLESS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "megatron_core", "qalora_group_size", "init_lora_weights",
    "init_weights", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying", "runtime_config",
    "projection_prng_key", "save_projection", "vera_dropout", "d_initial",
}  # fmt: skip
_UNSET: tuple[Any, ...] = (None, False, "none", [], {})
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class PeftAdapter:
    """An adapter in terms of the format, apart from names on disk.

    Attributes:
        kind: "LORA" or "VERA".
        layers: per module path, the leaves up (out, r), down (r, in) and magnitude (out,), or b and d.
        kinds: per module path, linear, embedding or convolution.
        windows: kernel size per convolution.
        alphas: per module path, alpha.
        shared: for VeRA, the shared up and down.
        whole: tensors of modules trained whole, by parameter name.
        bases: copies of base weights that peft puts beside adapted embeddings, by module path.
        options: other fields of the configuration.
    """

    kind: str
    layers: dict[str, dict[str, Tensor]]
    kinds: dict[str, str]
    windows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def rank(self, path: str) -> int:
        """Return the rank of a layer."""
        leaves = self.layers[path]
        return int((leaves["down"] if "down" in leaves else leaves["d"]).shape[0])


def to_disk(leaf: str, value: Tensor, kind: str, window: Sequence[int] = ()) -> Tensor:
    """Give a leaf the shape that it has on disk."""
    if kind == "embedding" and leaf in ("up", "down"):
        return value.T
    if kind == "convolution" and leaf == "down":
        return value.reshape(len(value), -1, *window)
    if kind == "convolution" and leaf == "up":
        return value.reshape(*value.shape, *(1,) * len(window))
    if kind == "convolution":
        return value.reshape(1, -1, *(1,) * len(window))
    return value


def from_disk(leaf: str, value: Tensor, kind: str) -> Tensor:
    """Undo `to_disk`."""
    if kind == "embedding" and leaf in ("up", "down"):
        return value.T
    if kind == "convolution":
        return value.flatten() if leaf == "magnitude" else value.flatten(1)
    return value


def names(adapter: PeftAdapter) -> dict[tuple[str, str], str]:
    """Return the name on disk of every leaf of every layer, by (path, leaf)."""
    table = _LEAVES["vera"] if adapter.kind == "VERA" else None
    return {
        (path, leaf): f"{_PREFIX}{path}.{(table or _LEAVES[adapter.kinds[path]])[leaf]}"
        for path, leaves in adapter.layers.items()
        for leaf in leaves
    }


def tensors(adapter: PeftAdapter) -> dict[str, Tensor]:
    """Return the tensors as they are on disk."""
    result = {}
    for (path, leaf), name in names(adapter).items():
        value = adapter.layers[path][leaf]
        result[name] = to_disk(leaf, value, adapter.kinds[path], adapter.windows.get(path, ()))
    result.update({_SHARED[key]: value for key, value in adapter.shared.items()})
    result.update({f"{_PREFIX}{key}": value for key, value in adapter.whole.items()})
    return result


def config(adapter: PeftAdapter) -> dict[str, Any]:
    """Return the configuration as it is on disk; patterns appear only where layers differ."""
    ranks = {path: adapter.rank(path) for path in adapter.layers}
    rank = _most_common(list(ranks.values()))
    common = {
        "peft_type": adapter.kind,
        "r": rank,
        "target_modules": sorted(adapter.layers),
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        **adapter.options,
    }
    if adapter.kind == "VERA":
        return {
            **common,
            "projection_prng_key": 0,
            "save_projection": True,
            "vera_dropout": 0.0,
            "d_initial": 0.1,
        }
    alphas = {path: adapter.alphas.get(path, float(r)) for path, r in ranks.items()}
    alpha = _most_common([alphas[path] for path, r in ranks.items() if r == rank])
    return {
        **common,
        "lora_alpha": _integral(alpha),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": any("magnitude" in leaves for leaves in adapter.layers.values()),
        "init_lora_weights": True,
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {f"^{re.escape(p)}": _integral(a) for p, a in sorted(alphas.items()) if a != alpha},
        "lora_bias": False,
    }


def _most_common(values: Sequence[Any]) -> Any:
    return max(sorted(set(values)), key=values.count)


def _integral(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def write(folder: Path, adapter: PeftAdapter) -> None:
    """Write configuration and tensors into a folder that exists."""
    write_tensors(folder / TENSORS, tensors(adapter))
    write_json(folder / CONFIG, config(adapter))


# Reading ----------------------------------------------------------------------------------------------


def read(path: str | Path) -> PeftAdapter:
    """Read a peft folder of LoRA, DoRA or VeRA.

    Raises:
        FormatError: it is truncated, or of another method.
        Incompatible: it uses a feature that would be lost.
    """
    folder = Path(path)
    settings = read_json(folder / CONFIG)
    kind = settings.get("peft_type")
    if kind not in ("LORA", "VERA"):
        raise FormatError(f"{folder} holds a peft adapter of type {kind!r}; LORA and VERA are read")
    _refuse_lost_features(settings, folder)
    found = read_tensors(folder / TENSORS)
    try:
        return assemble(settings, found)
    except FormatError as error:
        raise FormatError(f"{folder} {error}") from None
    except Exception as error:  # whatever a changed file makes of shapes and types
        raise FormatError(f"{folder / CONFIG} does not describe its tensors: {error!r}") from None


def _refuse_lost_features(settings: Mapping[str, Any], folder: Path) -> None:
    for key, value in settings.items():
        if key not in _HARMLESS and value not in _UNSET:
            raise Incompatible(
                f"{folder} uses {key}={value!r}, which would be lost; convert it to plain LoRA first"
            )
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_MOVES_BASE):
        raise Incompatible(
            f"{folder} was started by {start}, which moves the base at every load; convert it first with "
            "peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def assemble(settings: Mapping[str, Any], found: Mapping[str, Tensor]) -> PeftAdapter:
    """Return what a configuration and its tensors on disk mean: the inverse of `config` and `tensors`.

    Raises:
        FormatError: they do not belong together; the sentence goes on after the folder's name.
    """
    adapter = PeftAdapter(str(settings["peft_type"]), {}, {})
    rest = dict(found)
    if adapter.kind == "VERA":
        adapter.shared = {key: rest.pop(name) for key, name in _SHARED.items() if name in rest}
        if len(adapter.shared) < 2:
            raise FormatError("does not hold the shared pair of its VeRA; save it with save_projection=True")
    for name, value in found.items():
        place = _place(name, value, adapter.kind)
        if place is not None:
            _take_leaf(adapter, *place, value)
            del rest[name]
    _take_bases(adapter, rest)
    _take_whole(adapter, settings, rest)
    _check_layers(adapter, bool(settings.get("use_dora")))
    if adapter.kind == "LORA":
        adapter.alphas = {path: _alpha(settings, path, adapter.rank(path)) for path in adapter.layers}
    return adapter


def _place(name: str, value: Tensor, kind: str) -> tuple[str, str, str] | None:
    """Return path, leaf and layer kind of a tensor on disk, or None where it is no leaf of a layer."""
    for table in ("vera",) if kind == "VERA" else ("linear", "embedding"):
        for leaf, suffix in _LEAVES[table].items():
            if name.startswith(_PREFIX) and name.endswith(f".{suffix}"):
                path = name[len(_PREFIX) : -len(suffix) - 1]
                layer_kind = "linear" if table == "vera" else table
                return path, leaf, "convolution" if value.dim() > 2 else layer_kind
    return None


def _take_leaf(adapter: PeftAdapter, path: str, leaf: str, kind: str, value: Tensor) -> None:
    tells = leaf != "magnitude" or kind == "convolution"
    if tells and adapter.kinds.setdefault(path, kind) != kind:
        raise FormatError(f"holds tensors of {path} that belong to layers of two kinds")
    if kind == "convolution" and leaf == "down":
        adapter.windows[path] = tuple(value.shape[2:])
    adapter.layers.setdefault(path, {})[leaf] = from_disk(leaf, value, kind)


def _take_bases(adapter: PeftAdapter, rest: dict[str, Tensor]) -> None:
    """Set apart the copies of base weights that peft writes beside adapted embeddings and output heads."""
    for path in adapter.layers:
        value = rest.pop(f"{_PREFIX}{path}.base_layer.weight", None)
        if value is not None:
            adapter.bases[path] = value


def _take_whole(adapter: PeftAdapter, settings: Mapping[str, Any], rest: Mapping[str, Tensor]) -> None:
    whole = tuple(settings.get("modules_to_save") or ())
    for name, value in rest.items():
        key = name.removeprefix(_PREFIX)
        if not any(f".{module}." in f".{key}" for module in whole):
            raise FormatError(f"holds {name}, which is no part of a {adapter.kind} adapter")
        adapter.whole[key] = value


def _check_layers(adapter: PeftAdapter, dora: bool) -> None:
    needed = {"b", "d"} if adapter.kind == "VERA" else {"up", "down"}
    needed |= {"magnitude"} if dora else set()
    if not adapter.layers:
        raise FormatError("holds no adapted layer")
    for path, leaves in adapter.layers.items():
        if set(leaves) != needed:
            lacking, extra = sorted(needed - set(leaves)), sorted(set(leaves) - needed)
            what = f"lacks {', '.join(lacking)}" if lacking else f"holds {', '.join(extra)}"
            raise FormatError(f"{what} of {path}, against its configuration")
        if "up" in leaves and leaves["up"].shape[1] != leaves["down"].shape[0]:
            raise FormatError(f"gives {path} two factors whose ranks differ")


def _alpha(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """Return the alpha that divided by the rank gives a layer's scale."""
    patterns = dict(settings.get("alpha_pattern") or {})
    keys = [key for key in patterns if re.match(rf"(.*\.)?({key})$", path)]
    alpha = float(patterns[keys[0]] if keys else settings.get("lora_alpha", 8))
    if not math.isfinite(alpha):
        raise FormatError(f"gives {path} an alpha that is not finite")
    return alpha * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
