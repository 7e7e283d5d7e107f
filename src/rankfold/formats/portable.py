"""The plain LoRA that every server reads alike.

Scale folded into B, alpha = r, one rank for all weights (zero-padded), no patterns, no flags, no tensors
beside A and B of linear layers, explicit last names as targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Incompatible, RankfoldError
from . import peft
from .files import read_json, read_tensors

LARGEST_RANK = 512
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_rslora": (False, None), "use_dora": (False, None), "bias": ("none", None),
    "lora_bias": (False, None), "modules_to_save": (None, []), "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}), "layer_replication": (None, []), "use_qalora": (False, None),
    "use_bdlora": (False, None), "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []), "layers_to_transform": (None, []), "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, None), "exclude_modules": (None, []), "arrow_config": (None,),
    "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
    "megatron_config": (None,), "ensure_weight_tying": (False, None), "loftq_config": (None, {}),
}  # fmt: skip


def write(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], options: Mapping[str, Any]) -> int:
    """Write the portable form of changes `up @ down` into a folder that exists.

    Args:
        folder: where.
        pairs: up (out, r) and down (r, in) by module path, scale folded in.
        options: further fields of the configuration: base model and task.

    Returns:
        The common rank.

    Raises:
        Incompatible: the rank is above what servers take.
    """
    rank = max(up.shape[1] for up, _ in pairs.values())
    if rank > LARGEST_RANK:
        raise Incompatible(
            f"rank {rank} is above {LARGEST_RANK}, the most that servers take; pass rank= or max_error="
        )
    layers = {path: padded(*pair, rank) for path, pair in pairs.items()}
    last_names = sorted({path.rpartition(".")[2] for path in pairs})
    settings = {**options, "target_modules": last_names}
    peft.write(folder, peft.PeftAdapter("LORA", layers, dict.fromkeys(pairs, "linear"), options=settings))
    return rank


def padded(up: Tensor, down: Tensor, rank: int) -> dict[str, Tensor]:
    """Return both factors, filled with zeros up to a rank, which is alpha too for a scale of 1."""
    missing = rank - up.shape[1]
    pad = torch.nn.functional.pad
    return {"up": pad(up, (0, missing)), "down": pad(down, (0, 0, 0, missing))}


def check(folder: str | Path) -> list[str]:
    """Return why servers would read a peft folder differently or refuse it; an empty list if none would.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Example:
        >>> check("no/such/folder")
        ['there is no file no/such/folder/adapter_config.json']
    """
    try:
        settings = read_json(Path(folder) / peft.CONFIG)
        tensors = read_tensors(Path(folder) / peft.TENSORS)
    except RankfoldError as error:
        return [str(error)]
    return [*_check_settings(settings), *_check_tensors(settings, tensors), *_check_files(Path(folder))]


def _check_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, good in _MUST_BE.items():
        if settings.get(key) not in good:
            yield f"{key} is {settings.get(key)!r}; servers ignore or refuse anything but {good[0]!r}"
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not _is_number(alpha):
        yield "lora_alpha is missing: servers refuse the adapter or assume a scale"
    elif alpha != rank:
        yield f"lora_alpha is {alpha} and r is {rank}: fold the scale into B and set them equal"
    if not _is_number(rank) or not isinstance(rank, int) or not 1 <= rank <= LARGEST_RANK:
        yield f"r is {rank!r}; servers take 1 to {LARGEST_RANK}"
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        yield f"target_modules is {targets!r}; servers want a list of names, not a pattern"
    elif any("." in target for target in targets):
        yield "target_modules holds dotted paths; servers compare last names"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def _check_tensors(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        path, side = _split(name)
        if path is None or side is None:
            yield f"{name} is no A or B of a linear layer: servers refuse or skip it"
        elif value.dim() != 2:
            yield f"{name} has shape {tuple(value.shape)}; servers read linear layers only"
        else:
            sides.setdefault(path, {})[side] = value
    for path, pair in sides.items():
        yield from _check_pair(path, pair, settings)
    if not sides:
        yield "there is no adapted layer"


def _check_pair(path: str, pair: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[str]:
    rank, targets = settings.get("r"), settings.get("target_modules")
    if set(pair) != {"A", "B"}:
        yield f"{path} lacks lora_{'B' if 'A' in pair else 'A'}"
    elif pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
        sizes = f"{pair['A'].shape[0]} in A and {pair['B'].shape[1]} in B"
        yield f"{path} has rank {sizes}, not r = {rank}: some servers scale by one and some by the other"
    if isinstance(targets, list) and path.rpartition(".")[2] not in targets:
        yield f"{path} is not among target_modules"
    if not all(torch.isfinite(value).all() for value in pair.values()):
        yield f"{path} holds numbers that are not finite"


def _split(name: str) -> tuple[str | None, str | None]:
    for side in "AB":
        suffix = f".lora_{side}.weight"
        if name.startswith("base_model.model.") and name.endswith(suffix):
            path = name[len("base_model.model.") : -len(suffix)]
            return (None if "base_layer" in path else path), side
    return None, None


def _check_files(folder: Path) -> Iterator[str]:
    if (folder / "added_tokens.json").exists():
        yield "added_tokens.json is beside the adapter: some servers refuse new tokens"
