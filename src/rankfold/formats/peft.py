"""The peft adapter format: LoRA, DoRA and VeRA, in and out.

One map per layer kind says which leaf has which name and shape on disk; it is read in both directions, so writing
and reading cannot drift apart.
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
# What changes the meaning of the tensors and is not read; any other value than these is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False,), "bias": ("none",), "use_qalora": (False,), "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []), "layer_replication": (None, []), "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}), "kasa_config": (None,), "velora_config": (None,),
    "monteclora_config": (None,), "arrow_config": (None,), "megatron_config": (None,), "loftq_config": (None, {}),
}  # fmt: skip
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


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
        options: other fields of the configuration.
    """

    kind: str
    layers: dict[str, dict[str, Tensor]]
    kinds: dict[str, str]
    windows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
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
        return value.unflatten(1, (-1, *window))
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
        kind = adapter.kinds.get(path, "linear") if adapter.kind == "LORA" else "linear"
        result[name] = to_disk(leaf, value, kind, adapter.windows.get(path, ()))
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
        return _assemble(kind, settings, found, folder)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{folder / CONFIG} does not describe its tensors: {error}") from None


def _refuse_lost_features(settings: Mapping[str, Any], folder: Path) -> None:
    for key, neutral in _NEUTRAL.items():
        if key in settings and settings[key] not in neutral:
            raise Incompatible(
                f"{folder} uses {key}={settings[key]!r}, which would be lost; convert it to plain LoRA first"
            )
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_MOVES_BASE):
        raise Incompatible(
            f"{folder} was started by {start}, which moves the base at every load; convert it first with peft's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _assemble(
    kind: str, settings: Mapping[str, Any], found: Mapping[str, Tensor], folder: Path
) -> PeftAdapter:
    adapter = PeftAdapter(kind, {}, {})
    rest = dict(found)
    if kind == "VERA":
        adapter.shared = {key: rest.pop(name) for key, name in _SHARED.items() if name in rest}
        if len(adapter.shared) < 2:
            raise FormatError(
                f"{folder} does not hold the shared pair of its VeRA; save it with save_projection=True"
            )
    for name, value in found.items():
        place = _place(name, value, kind)
        if place is None:
            continue
        path, leaf, layer_kind = place
        if leaf != "magnitude" or layer_kind == "convolution":
            adapter.kinds[path] = layer_kind
        adapter.layers.setdefault(path, {})[leaf] = from_disk(leaf, value, layer_kind)
        if layer_kind == "convolution" and leaf == "down":
            adapter.windows[path] = tuple(value.shape[2:])
        del rest[name]
    _take_whole(adapter, settings, rest, folder)
    _check_layers(adapter, folder)
    adapter.alphas = {
        path: _alpha(settings, path, adapter.rank(path)) for path in adapter.layers if kind == "LORA"
    }
    return adapter


def _place(name: str, value: Tensor, kind: str) -> tuple[str, str, str] | None:
    for layer_kind in ("vera",) if kind == "VERA" else ("linear", "embedding"):
        for leaf, suffix in _LEAVES[layer_kind].items():
            if name.startswith(_PREFIX) and name.endswith(f".{suffix}"):
                path = name[len(_PREFIX) : -len(suffix) - 1]
                convolution = layer_kind == "linear" and value.dim() > 2
                return (
                    path,
                    leaf,
                    "convolution" if convolution else "linear" if kind == "VERA" else layer_kind,
                )
    return None


def _take_whole(
    adapter: PeftAdapter, settings: Mapping[str, Any], rest: Mapping[str, Tensor], folder: Path
) -> None:
    whole = tuple(settings.get("modules_to_save") or ())
    for name, value in rest.items():
        key = name.removeprefix(_PREFIX)
        if not any(part in whole for part in key.split(".")):
            raise FormatError(f"{folder} holds {name}, which is no part of a {adapter.kind} adapter")
        adapter.whole[key] = value


def _check_layers(adapter: PeftAdapter, folder: Path) -> None:
    needed = {"b", "d"} if adapter.kind == "VERA" else {"up", "down"}
    if not adapter.layers:
        raise FormatError(f"{folder} holds no adapted layer")
    for path, leaves in adapter.layers.items():
        if not needed <= set(leaves):
            raise FormatError(f"{folder} lacks {', '.join(sorted(needed - set(leaves)))} of {path}")
    dora = {path for path, leaves in adapter.layers.items() if "magnitude" in leaves}
    if dora and len(dora) < len(adapter.layers):
        raise FormatError(f"{folder} has a DoRA magnitude for some layers only")


def _alpha(settings: Mapping[str, Any], path: str, rank: int) -> float:
    alpha = settings.get("lora_alpha", 8)
    for key, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            alpha = value
            break
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
