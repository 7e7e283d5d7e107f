"""Single files of low-rank changes: LyCORIS, kohya's trainers, diffusers, and GGUF.

    LoRA      B A alpha / r; with a core in the middle, a kernel in Tucker form
    LoHa      (B1 A1) * (B2 A2) alpha / r
    LoKr      W1 (x) W2 alpha / r, each whole or a product; both whole have no scale
    full      the change itself

A file that holds no alpha has scale 1, and so has alpha 0, as the tools that write such files read them. The
weight that LyCORIS 4.1 merges holds alpha / r twice for LoHa and LoKr; its forward, and this, once.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, FormatError, Incompatible, MissingDependency, RankfoldError
from . import gguf
from .changes import Changes
from .files import read_tensors
from .readers_model import Places, is_flattened
from .readers_pairs import Pair, decomposed, hadamard, kronecker, plain, tucker, whole_pair, wide

_METADATA = "lora_adapter_metadata"  # of diffusers, in the header of a file
_SUFFIXES = {
    "lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid",
    "lora_B.weight": "up", "lora_A.weight": "down",
    "lora.up.weight": "up", "lora.down.weight": "down",
    "lora_linear_layer.up.weight": "up", "lora_linear_layer.down.weight": "down",
    "alpha": "alpha", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude",
    "hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b",
    "hada_t1": "t1", "hada_t2": "t2",
    "lokr_w1": "k1", "lokr_w1_a": "k1_a", "lokr_w1_b": "k1_b",
    "lokr_w2": "k2", "lokr_w2_a": "k2_a", "lokr_w2_b": "k2_b", "lokr_t2": "kt",
    "diff": "diff",
}  # fmt: skip
# The keys that old versions of diffusers wrote: in the place of a layer, its name in the attention processor.
_OLD = re.compile(
    r"(?P<block>.*?)(?P<processor>\.processor)?\.to_(?P<part>q|k|v|out)_lora\.(?P<side>up|down)\.weight"
)
_OLD_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_UNREAD = {
    "diff_b": "a change of a bias", "w_norm": "a change of a norm", "b_norm": "a change of a norm",
    "oft_blocks": "OFT, a rotation of the base weight", "rescale": "OFT, a rotation of the base weight",
    "a1.weight": "GLoRA, a factor of the base weight", "b1.weight": "GLoRA, a factor of the base weight",
    "on_input": "IA3, which rescales the base weight",
    "lambda_layer": "T-LoRA, whose change differs from one time step to the next",
    "lora_B.bias": "a change of a bias",
    "lora_embedding_A": "an embedding, which is read in peft folders only",
}  # fmt: skip
Leaves = dict[str, Tensor]


def read_file(file: Path, model: nn.Module | None) -> Changes:
    """Read a safetensors file of low-rank changes, or a GGUF LoRA.

    Raises:
        FormatError: it is truncated, or holds a tensor of no form that is read.
        Incompatible: it holds a change that is no low-rank pair, or one that depends on the base.
        BaseMismatch: a name matches no layer of the model.
    """
    if file.suffix == ".gguf":
        return _read_gguf(file, model)
    if file.suffix != ".safetensors":
        raise FormatError(
            f"{file} is no .safetensors or .gguf file; a pickled one could run code and is not read"
        )
    tensors = read_tensors(file)
    scales = _scales(file)
    places = Places(model) if model is not None else None
    try:
        return _assemble(_grouped(tensors), scales, places)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from None
    except RankfoldError:
        raise
    except Exception as error:  # whatever a changed file makes of shapes and types
        raise FormatError(f"{file} holds tensors that do not belong together: {error}") from None


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, Leaves]:
    """Return the leaves of every weight by its name in the file.

    Raises:
        FormatError: a key is of no form that is read.
    """
    found: dict[str, Leaves] = {}
    for key, tensor in tensors.items():
        name, leaf = _split(key)
        if leaf in found.setdefault(name, {}):
            raise FormatError(f"{name} has two tensors for its {leaf}")
        check_finite(key, tensor)
        found[name][leaf] = tensor
    if not found:
        raise FormatError("it holds no tensor")
    return found


def check_finite(key: str, tensor: Tensor) -> None:
    """Raise where a tensor of a file holds NaN or infinite entries."""
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise FormatError(f"{key} holds NaN or infinite entries")


def _split(key: str) -> tuple[str, str]:
    old = _OLD.fullmatch(key)
    if old:
        part = old["part"]
        last = ("to_out.0" if part == "out" else f"to_{part}") if old["processor"] else _OLD_NAMES[part]
        return f"{old['block']}.{last}", old["side"]
    for suffix, leaf in _SUFFIXES.items():
        if key.endswith(f".{suffix}"):
            return key[: -len(suffix) - 1], leaf
    for suffix, method in _UNREAD.items():
        if key.endswith(f".{suffix}"):
            raise Incompatible(f"{key} belongs to {method}, which no low-rank change of a weight can say")
    raise FormatError(f"it holds {key}, which is of no form of low-rank changes that is read")


def _assemble(
    grouped: Mapping[str, Leaves], scales: Callable[[str, int], float], places: Places | None
) -> Changes:
    pairs: dict[str, Pair] = {}
    windows: dict[str, tuple[int, ...]] = {}
    for name, leaves in grouped.items():
        path = places.path(name) if places else name.removeprefix("base_model.model.")  # of peft
        if path in pairs:
            raise FormatError(f"{name} and another name mean the same layer, {path}")
        try:
            pairs[path], window = pair_of(leaves, scales(name, _rank(leaves)))
            if "magnitude" in leaves:
                pairs[path] = _with_magnitude(name, path, pairs[path], leaves["magnitude"], places)
        except FormatError as error:
            raise FormatError(f"{name} {error}") from None
        windows |= {path: window} if window else {}
    flattened = places is None and all(map(is_flattened, grouped))
    kinds = dict.fromkeys(windows, "convolution")
    return Changes(pairs, kinds, windows, source=_dialect(grouped), flattened=flattened)


def _with_magnitude(name: str, path: str, pair: Pair, magnitude: Tensor, places: Places | None) -> Pair:
    if places is None:
        raise Incompatible(f"{name} is a DoRA, whose change depends on the base weight; pass model=")
    columns = magnitude.dim() > 1 and magnitude.shape[0] == 1 < magnitude.shape[1] == magnitude.numel()
    weight = places.matrix(path)
    return decomposed(weight, (pair[0] @ pair[1]).to(weight.device), magnitude.to(weight.device), columns)


def _dialect(grouped: Mapping[str, Leaves]) -> str:
    first = next(iter(grouped))
    forms = {leaf for leaves in grouped.values() for leaf in leaves}
    if first.startswith("lycoris_") or forms - {"up", "down", "alpha"}:
        return "LyCORIS"
    return "kohya" if is_flattened(first) else "diffusers"


# One weight -------------------------------------------------------------------------------------------


def pair_of(leaves: Mapping[str, Tensor], scale: float) -> tuple[Pair, tuple[int, ...]]:
    """Return the exact pair of one weight's change, its scale folded in, and its window.

    Args:
        leaves: by their common names (`up`, `w1_a`, ...), `alpha` among them where the file has it.
        scale: where the file has no alpha.

    Raises:
        FormatError: tensors are missing or do not fit; the sentence goes on after the weight's name.
    """
    form = next((form for form in _FORMS if form[0] <= set(leaves)), None)
    if form is None:
        raise FormatError(f"has {', '.join(sorted(leaves))} and lacks the rest of a change")
    needed, more, build = form
    extra = sorted(set(leaves) - needed - more - {"alpha", "magnitude"})
    if extra:
        raise FormatError(f"has {extra[0]} beside tensors of another form")
    try:
        (up, down), window = build(leaves)
    except RuntimeError as error:
        raise FormatError(f"has tensors that do not multiply: {error}") from None
    _check_pair(up, down, window)
    factor = _given_scale(leaves) if "alpha" in leaves else scale
    return (up * factor, down), window


def _check_pair(up: Tensor, down: Tensor, window: tuple[int, ...]) -> None:
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0] or not up.numel() * down.numel():
        raise FormatError(f"has factors {tuple(up.shape)} and {tuple(down.shape)}, which do not multiply")
    if window and down.shape[1] % math.prod(window):
        raise FormatError(f"has a window {window} that does not divide its {down.shape[1]} columns")


def _given_scale(leaves: Mapping[str, Tensor]) -> float:
    alpha = leaves["alpha"]
    if alpha.numel() != 1 or not math.isfinite(float(alpha)):
        raise FormatError("has an alpha that is no number")
    if {"k1", "k2"} <= set(leaves):
        return 1.0  # a product of two whole matrices has no rank to divide by
    return float(alpha) / _rank(leaves) if float(alpha) else 1.0


def _rank(leaves: Mapping[str, Tensor]) -> int:
    for leaf in ("down", "w1_b", "k2_b", "k1_b"):
        if leaf in leaves and leaves[leaf].dim():
            return max(1, leaves[leaf].shape[0])
    return 1


def _lora(leaves: Mapping[str, Tensor]) -> tuple[Pair, tuple[int, ...]]:
    up, down, mid = leaves["up"], leaves["down"], leaves.get("mid")
    if mid is None:
        return plain(up, down), tuple(down.shape[2:])
    if down.shape[2:].numel() != 1 or up.shape[2:].numel() != 1:
        raise FormatError("has a core between factors that are no pointwise kernels")
    return tucker(mid, up.flatten(1), down.flatten(1)), tuple(mid.shape[2:])


def _loha(leaves: Mapping[str, Tensor]) -> tuple[Pair, tuple[int, ...]]:
    cores = [leaves.get(f"t{side}") for side in (1, 2)]
    sides = [(leaves[f"w{side}_a"], leaves[f"w{side}_b"]) for side in (1, 2)]
    if cores[0] is None or cores[1] is None:
        pairs = [plain(*side) for side in sides]
        for pair in pairs:
            _check_pair(*pair, ())
        return hadamard(*pairs), ()
    # With a core both factors are stored rank first.
    pairs = [
        tucker(core, up.mT, down) for core, (up, down) in zip(cores, sides, strict=True) if core is not None
    ]
    return hadamard(*pairs), tuple(cores[0].shape[2:])


def _lokr(leaves: Mapping[str, Tensor]) -> tuple[Pair, tuple[int, ...]]:
    left = whole_pair(wide(leaves["k1"])) if "k1" in leaves else plain(leaves["k1_a"], leaves["k1_b"])
    window: tuple[int, ...] = ()
    if "k2" in leaves:
        window = tuple(leaves["k2"].shape[2:])
        right = whole_pair(wide(leaves["k2"]).flatten(1))
    elif "kt" in leaves:
        window = tuple(leaves["kt"].shape[2:])
        right = tucker(leaves["kt"], leaves["k2_a"].mT, leaves["k2_b"])
    else:
        window = tuple(leaves["k2_b"].shape[2:])
        right = plain(leaves["k2_a"], leaves["k2_b"])
    for pair in (left, right):
        _check_pair(*pair, ())
    return kronecker(left, right), window


def _full(leaves: Mapping[str, Tensor]) -> tuple[Pair, tuple[int, ...]]:
    change = leaves["diff"]
    if change.dim() < 2:
        raise FormatError(f"has a change of shape {tuple(change.shape)}, which is no matrix")
    return whole_pair(wide(change).flatten(1)), tuple(change.shape[2:])


_Form = tuple[set[str], set[str], Callable[[Mapping[str, Tensor]], tuple[Pair, tuple[int, ...]]]]
_FORMS: list[_Form] = [
    ({"up", "down"}, {"mid"}, _lora),
    ({"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}, set(), _loha),
    ({"w1_a", "w1_b", "w2_a", "w2_b"}, set(), _loha),
    ({"k1", "k2"}, set(), _lokr),
    ({"k1_a", "k1_b", "k2"}, set(), _lokr),
    ({"k1", "k2_a", "k2_b"}, {"kt"}, _lokr),
    ({"k1_a", "k1_b", "k2_a", "k2_b"}, {"kt"}, _lokr),
    ({"diff"}, set(), _full),
]


# The header of diffusers ------------------------------------------------------------------------------


def _scales(file: Path) -> Callable[[str, int], float]:
    """Return what gives a weight's scale by its name and rank, where the file has no alpha for it."""
    settings = _header(file)
    return lambda name, rank: _header_scale(settings, name, rank)


def _header(file: Path) -> dict[str, Any]:
    """Return the configuration of peft that diffusers writes into a header, by component and field."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            text = (opened.metadata() or {}).get(_METADATA)
        settings = {} if text is None else json.loads(text)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise FormatError(f"{file} has a header that is not valid: {error}") from None
    if not isinstance(settings, dict):
        raise FormatError(f"{file} has a header that describes no adapter")
    return settings


def _header_scale(settings: Mapping[str, Any], name: str, rank: int) -> float:
    component, _, path = name.partition(".")
    own = {
        key.removeprefix(f"{component}."): value
        for key, value in settings.items()
        if key.startswith(f"{component}.")
    }
    alpha = pattern_value(own.get("alpha_pattern"), path, own.get("lora_alpha"))
    if alpha is None:
        return 1.0
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= 1e300:
        raise FormatError("has an alpha in the header that is no number")
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def pattern_value(patterns: Any, path: str, default: Any) -> Any:
    """Return what peft's patterns say of a path: the value of the first key that matches its end."""
    if patterns is not None and not isinstance(patterns, dict):
        raise FormatError("has patterns that are no mapping")
    for key, value in (patterns or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", path)
        except re.error:
            raise FormatError(f"has the pattern {key!r}, which is no regular expression") from None
        if matches:
            return value
    return default


# GGUF -------------------------------------------------------------------------------------------------


def _read_gguf(file: Path, model: nn.Module | None) -> Changes:
    """Read a LoRA for llama.cpp; without a model names and the order of rows stay those of the GGUF model."""
    try:
        fields, tensors = _gguf_parts(file)
    except RankfoldError:
        raise
    except Exception as error:  # the reader has no errors of its own
        raise FormatError(f"{file} is truncated or no GGUF file: {error!r}") from None
    if fields.get("adapter.type") != "lora":
        raise FormatError(f"{file} is a GGUF file of something else than a LoRA")
    if "adapter.alora.invocation_tokens" in fields:
        raise Incompatible(f"{file} applies its change to some tokens only, which no low-rank change can say")
    alpha = fields.get("adapter.lora.alpha")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(f"{file} has no adapter.lora.alpha")
    sides = _gguf_sides(file, tensors)
    pairs = {name: _gguf_pair(file, name, both, float(alpha)) for name, both in sides.items()}
    base = str(fields.get("general.base_model.0.name") or "")
    if model is not None:
        return Changes(dict(_in_model(pairs, model)), base=base, source="GGUF")
    kinds = {name: "embedding" for name in pairs if name == "token_embd"}
    return Changes(pairs, kinds, base=base, source="GGUF", flattened=True)


def _gguf_sides(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Leaves]:
    """Return both factors of every weight, by llama.cpp's name of it."""
    sides: dict[str, Leaves] = {}
    for key, tensor in tensors.items():
        name, _, side = key.rpartition(".weight.lora_")
        if not name or side not in ("a", "b"):
            raise FormatError(f"{file} holds {key}, which is no factor of a LoRA")
        check_finite(f"{file}: {key}", tensor)
        sides.setdefault(name, {})[side] = tensor
    if not sides:
        raise FormatError(f"{file} holds no tensor")
    return sides


def _in_model(pairs: Mapping[str, Pair], model: nn.Module) -> Iterator[tuple[str, Pair]]:
    """Yield pairs under the model's paths, their rows in its order."""
    architecture, config = gguf.architecture_of(model), model.config
    paths = dict(_gguf_names(model))
    for name, (up, down) in pairs.items():
        if name not in paths:
            raise BaseMismatch(f"{name} matches no layer of the model")
        if architecture.reorders and name.endswith((".attn_q", ".attn_k")):
            heads = config.num_attention_heads  # type: ignore[union-attr]
            if name.endswith(".attn_k"):
                heads = getattr(config, "num_key_value_heads", None) or heads
            order = gguf.rotary_order(up.shape[0], int(heads))  # type: ignore[arg-type]
            up = torch.empty_like(up).index_copy_(0, order, up)
        yield paths[name], (up, down)


def _gguf_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield llama.cpp's name and the path of every layer that has one."""
    for path in Places(model).paths:
        with contextlib.suppress(Incompatible):
            yield gguf.check(model, [path])[path].removesuffix(".weight"), path


def _gguf_pair(file: Path, name: str, sides: Leaves, alpha: float) -> Pair:
    if set(sides) != {"a", "b"} or any(side.dim() != 2 for side in sides.values()):
        raise FormatError(f"{file} lacks a factor of {name}, or has one that is no matrix")
    down, up = sides["a"], sides["b"]
    scale = alpha / max(1, up.shape[1]) if alpha else 1.0
    if name == "token_embd":  # a is (vocabulary, r) and b (dimension, r)
        up, down = down, up.T
    if up.shape[1] != down.shape[0] or not up.numel() * down.numel():
        raise FormatError(
            f"{file} gives {name} factors {tuple(up.shape)} and {tuple(down.shape)}, which do not multiply"
        )
    return up * scale, down


def _gguf_parts(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and the tensors, dequantised, of a GGUF file."""
    try:
        import gguf as library
    except ImportError:
        raise MissingDependency("GGUF files need the library gguf: pip install 'rankfold[gguf]'") from None
    reader = library.GGUFReader(str(file))
    fields = {
        name: field.contents() if len(field.data) == 1 else None for name, field in reader.fields.items()
    }
    tensors = {}
    for tensor in reader.tensors:
        values = library.dequantize(tensor.data, tensor.tensor_type)
        tensors[str(tensor.name)] = torch.from_numpy(values.astype("float32")).clone()
    return fields, tensors
