"""The GGUF adapter that llama.cpp reads: plain LoRA under its own tensor names.

A file holds, for every adapted weight, A (r, in) as `<name>.lora_a` and B (out, r) as `<name>.lora_b`, where
the name is the base tensor's, such as `blk.0.attn_q.weight`. llama.cpp applies them at the scale alpha / r,
with one alpha for the whole file and r read from each tensor; so the scale is folded into B, every weight is
filled up with zeros to one rank, and alpha is that rank. Where its converter reorders the rows of a weight
(queries and keys of Llama and its relatives, whose rotary embedding pairs neighbours instead of halves), B is
reordered alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, MissingDependency
from .portable import padded

FILE = "adapter.gguf"
DTYPES = ("f32", "f16")
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of an architecture of transformers.

    Attributes:
        name: its own name.
        reorders: whether the rows of queries and keys are reordered.
    """

    name: str
    reorders: bool = False


# By transformers' model type: those whose other linear weights llama.cpp takes as they are. The ones that it
# splits, packs or turns are left out.
ARCHITECTURES: Mapping[str, Architecture] = {
    "arcee": Architecture("arcee", reorders=True),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "gpt2": Architecture("gpt2"),
    "granite": Architecture("granite", reorders=True),
    "llama": Architecture("llama", reorders=True),
    "mistral": Architecture("llama", reorders=True),
    "mixtral": Architecture("llama", reorders=True),
    "olmo": Architecture("olmo", reorders=True),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", reorders=True),
    "starcoder2": Architecture("starcoder2"),
}


def check(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Return llama.cpp's name of every adapted weight, by path.

    Raises:
        Incompatible: the architecture is unknown, or a weight has no place in a GGUF adapter.
    """
    architecture = architecture_of(model)
    library = _library()
    known = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    table = library.get_tensor_name_map(known[architecture.name], layers)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return {path: _name_of(path, table, tied) for path in paths}


def architecture_of(model: nn.Module) -> Architecture:
    """Return llama.cpp's architecture of a model of transformers.

    Raises:
        Incompatible: it is not among those that can be written.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    found = ARCHITECTURES.get(str(kind))
    if found is None:
        what = f"model type {kind!r}" if kind else type(model).__name__
        raise Incompatible(
            f"no GGUF names are known for {what}; there are {', '.join(ARCHITECTURES)}: export portable and "
            "convert it by llama.cpp's own script"
        )
    return found


def _name_of(path: str, table: Any, tied: bool) -> str:
    for candidate in (path, f"model.{path}"):  # a model without its head lacks the prefix
        name = table.get_name(f"{candidate}.weight", try_suffixes=(".weight",))
        if name is not None:
            break
    if name is None:
        raise Incompatible(f"{path} has no name in GGUF; leave it out of targets")
    if name.startswith("token_embd"):
        raise Incompatible(
            f"{path}: GGUF adapters are written of linear layers only; leave it out of targets"
        )
    if name.startswith("output.") and tied:
        raise Incompatible(
            f"{path} shares its tensor with the embedding, and llama.cpp has no adapter of such a head; "
            "leave it out of targets"
        )
    return str(name)


def write(
    file: Path,
    model: nn.Module,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    *,
    dtype: str = "f32",
    base: str = "",
) -> int:
    """Write changes `up @ down` of a model's weights as one file.

    Args:
        file: where; it must not be there.
        model: of transformers, whose configuration names the architecture.
        pairs: up (out, r) and down (r, in) by module path, scale folded in; ranks may differ.
        dtype: "f32" or "f16".
        base: name of the base model, for those who read the file; "" leaves it out.

    Returns:
        The common rank.

    Raises:
        Incompatible: llama.cpp has no place for one of them, or a number is too large for half precision.
        MissingDependency: the package gguf is not installed.
    """
    names, architecture, library = check(model, pairs), architecture_of(model), _library()
    rank = max(up.shape[1] for up, _ in pairs.values())
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        leaves = padded(*pair, rank)
        tensors[f"{names[path]}.lora_a"] = leaves["down"]
        tensors[f"{names[path]}.lora_b"] = _rows(leaves["up"], names[path], architecture, model.config)
    _write(
        library, file, architecture.name, rank, {k: _number(k, v, dtype) for k, v in tensors.items()}, base
    )
    return rank


def _write(
    library: ModuleType, file: Path, architecture: str, rank: int, tensors: Mapping[str, Tensor], base: str
) -> None:
    writer = library.GGUFWriter(file, architecture)
    writer.add_type(library.GGUFType.ADAPTER)
    writer.add_string(library.Keys.Adapter.TYPE, "lora")
    writer.add_float32(library.Keys.Adapter.LORA_ALPHA, float(rank))
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rows(up: Tensor, name: str, architecture: Architecture, config: Any) -> Tensor:
    """Return B with its rows where llama.cpp has those of the weight."""
    if not architecture.reorders or not name.endswith((".attn_q.weight", ".attn_k.weight")):
        return up
    heads = int(config.num_attention_heads)
    if name.endswith(".attn_k.weight"):
        heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return up[rotary_order(up.shape[0], heads).to(up.device)]


def rotary_order(rows: int, heads: int) -> Tensor:
    """Return which row of a weight stands at every place in llama.cpp's order.

    Within each head, entry j of the first half is followed by entry j of the second, for its rotary embedding
    turns neighbours where that of transformers turns halves.

    Args:
        rows: of the weight, a multiple of twice the heads.
        heads: of the attention.

    Example:
        >>> rotary_order(8, 2)
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _number(name: str, tensor: Tensor, dtype: str) -> Tensor:
    value = tensor.detach().to("cpu", torch.float32)
    if dtype == "f16":
        if float(value.abs().max()) > _LARGEST_HALF:
            raise Incompatible(f'{name} holds numbers too large for half precision; export with dtype="f32"')
        value = value.half()
    return value.contiguous()


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependency('GGUF needs the package gguf: pip install "rankfold[gguf]"') from error
    return gguf
