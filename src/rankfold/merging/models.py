"""The models that are merged, read one tensor at a time: live modules, and folders of safetensors files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import FormatError, Incompatible, MissingPath, UnsupportedLayer
from ..formats.files import read_json
from ..layers import adaptation_of

# The names that safetensors files give to types.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
ADAPTER_FILES = ("rankfold.json", "adapter_config.json")
DTYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_merged(self) -> bool:
        """Whether it holds real numbers; integers, and what is packed into them, are taken as they are."""
        return self.dtype.is_floating_point


@runtime_checkable
class Model(Protocol):
    """A model whose tensors are read one at a time."""

    @property
    def label(self) -> str:
        """What a sentence calls it."""

    @property
    def tensors(self) -> Mapping[str, Shape]:
        """Every tensor that is stored, once, in its order."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What describes the architecture, where anything does."""

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored; it must not be changed in place."""

    def module(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return a live copy with some of its tensors replaced."""


class LiveModel:
    """A module in memory.

    Args:
        root: the module; it is never changed.
        label: what a sentence calls it.

    Raises:
        UnsupportedLayer: it is adapted, so that its stored tensors are not its weights.
    """

    def __init__(self, root: nn.Module, label: str) -> None:
        if adaptation_of(root) is not None:
            raise UnsupportedLayer(
                f"{label} is adapted; fold its adapter into it (rf.fold), or merge adapters by adapters="
            )
        self.root, self.label = root, label
        self._state = {name: value for name, value in root.state_dict().items() if isinstance(value, Tensor)}
        self._owner = _owners(self._state)

    @cached_property
    def tensors(self) -> Mapping[str, Shape]:
        """Every tensor, under the first of its names."""
        return {
            name: Shape(tuple(value.shape), value.dtype)
            for name, value in self._state.items()
            if self._owner[name] == name
        }

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration that models of transformers carry."""
        own = getattr(getattr(self.root, "config", None), "to_dict", None)
        return dict(own()) if callable(own) else {}

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._state[name].detach()

    def module(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return a deep copy of the module with some of its tensors replaced."""
        twin = copy.deepcopy(self.root)
        with torch.no_grad():
            for name, value in twin.state_dict(keep_vars=True).items():
                if self._owner.get(name) in tensors:
                    new = tensors[self._owner[name]]
                    value.data = new.detach().to(value.device).clone()
        return twin


def _owners(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map every name to the first that stores the same numbers."""
    first: dict[tuple[Any, ...], str] = {}
    place = {}
    for name, value in state.items():
        storage = value.untyped_storage()
        where = (storage.data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
        key = where if value.numel() and storage.data_ptr() else (name,)
        place[name] = first.setdefault(key, name)
    return place


class ModelFolder:
    """A folder with a model in safetensors files, of which one tensor is read at a time.

    Args:
        path: of the folder.

    Raises:
        MissingPath: there is no such folder, no model in it, or a file of it is missing.
        FormatError: a file is truncated or no safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.label = Path(path), str(path)
        if not self.path.is_dir():
            raise MissingPath(f"there is no model folder {self.path}")
        self.files = dict(self._found())

    @cached_property
    def tensors(self) -> Mapping[str, Shape]:
        """Every tensor, shard by shard; weights that the architecture ties are listed once."""
        headers: dict[str, Shape] = {}
        for file in dict.fromkeys(self.files.values()):
            headers.update(self._header(file))
        absent = next((name for name in self.files if name not in headers), None)
        if absent is not None:
            raise FormatError(f"{self.files[absent]} does not hold {absent}, which the index says it does")
        kept = {name: headers[name] for name in headers if name in self.files}
        return {name: shape for name, shape in kept.items() if not self._is_second(name, kept)}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """What config.json says."""
        file = self.path / "config.json"
        return read_json(file) if file.is_file() else {}

    @property
    def shard_size(self) -> int:
        """The bytes of its largest file."""
        return max(file.stat().st_size for file in self.files.values())

    def read(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            FormatError: its file is truncated or no safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        file = self.files[name]
        try:
            with safe_open(str(file), "pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
            raise FormatError(f"{file} is truncated or no safetensors file: {error}") from None
        return tensor

    def module(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the model that its config.json names, of transformers, with some tensors replaced.

        Raises:
            Incompatible: config.json names no architecture of transformers.
        """
        import transformers

        names = self.config.get("architectures") or ["no architecture"]
        kind = getattr(transformers, names[0], None)
        if kind is None:
            raise Incompatible(
                f"{self.label}: this needs a live model, and its config.json names {names[0]}, which "
                "transformers does not have; pass modules instead of folders"
            )
        state = {name: tensors[name] if name in tensors else self.read(name) for name in self.tensors}
        config = transformers.AutoConfig.from_pretrained(self.path)
        module: nn.Module = kind.from_pretrained(None, config=config, state_dict=state)
        return module

    def _found(self) -> Iterator[tuple[str, Path]]:
        """Yield every tensor's name and file."""
        index = next(iter(sorted(self.path.glob("*.safetensors.index.json"))), None)
        if index is not None:
            yield from self._indexed(index)
            return
        files = [file for file in sorted(self.path.glob("*.safetensors")) if "adapter" not in file.name]
        if len(files) != 1 or any((self.path / name).is_file() for name in ADAPTER_FILES):
            raise MissingPath(self._why_none(files))
        for name in self._header(files[0]):
            yield name, files[0]

    def _indexed(self, index: Path) -> Iterator[tuple[str, Path]]:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise FormatError(f"{index} has no weight_map of names to files")
        for name, file in sorted(places.items(), key=lambda item: (item[1], item[0])):
            if Path(file).name != file:
                raise FormatError(f"{index} names {file!r}, which is no file of its folder")
            if not (self.path / file).is_file():
                raise MissingPath(f"the shard {self.path / file} is missing")
            yield name, self.path / file

    def _why_none(self, files: list[Path]) -> str:
        if any((self.path / name).is_file() for name in ADAPTER_FILES):
            return f"{self.path} holds an adapter, not a model"
        if files:
            return f"{self.path} holds {len(files)} safetensors files and no index that says what is where"
        if any(self.path.glob("*.bin")):
            return (
                f"{self.path} holds pickled weights only, which are not read; write it as safetensors "
                "(save_pretrained)"
            )
        return f"{self.path} holds no model: no model.safetensors, and no model.safetensors.index.json"

    def _header(self, file: Path) -> dict[str, Shape]:
        """Return what a file says of its tensors, none of which is read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
                return {
                    name: Shape(tuple(part.get_shape()), _TYPES[part.get_dtype()])
                    for name, part in slices.items()
                }
        except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
            raise FormatError(f"{file} is truncated or no safetensors file: {error}") from None

    def _is_second(self, name: str, tensors: Mapping[str, Shape]) -> bool:
        """Whether a tensor repeats the token embedding, to which config.json says that it is tied."""
        shape = tensors[name]
        vocabulary = self.config.get("vocab_size")
        if self.config.get("tie_word_embeddings") is not True or shape.shape[:1] != (vocabulary,):
            return False
        alike = [other for other, its in tensors.items() if its == shape]
        first = min(alike, key=_is_head)
        return _is_head(name) and first != name and torch.equal(self.read(first), self.read(name))


def _is_head(name: str) -> bool:
    """Whether a name is that of an output head, which transformers leaves out of a file where it is tied."""
    return "embed" not in name and "wte" not in name


def open_model(model: nn.Module | str | Path | Model, label: str) -> Model:
    """Return a model that is read one tensor at a time.

    Args:
        model: a module, a folder, or one that is open already.
        label: what a sentence calls a module.

    Raises:
        Incompatible: it is neither.
    """
    if isinstance(model, nn.Module):
        return LiveModel(model, label)
    if isinstance(model, str | Path):
        return ModelFolder(model)
    if isinstance(model, Model):
        return model
    raise Incompatible(f"{label} is a {type(model).__name__}; merge modules or folders of models")


def vocabulary(folder: Path) -> dict[str, int]:
    """Return the tokens of a folder's tokenizer and their numbers; nothing where none is known.

    Raises:
        FormatError: a file of it is no valid JSON.
    """
    known: dict[str, int] = {}
    for file in (folder / "tokenizer.json", folder / "vocab.json"):
        if file.is_file() and not known:
            known = _tokens(json.loads(file.read_text(encoding="utf-8")))
    words = folder / "vocab.txt"
    if not known and words.is_file():
        lines = words.read_text(encoding="utf-8").split("\n")
        known = {word.rstrip("\r"): number for number, word in enumerate(lines) if word}
    return known


def _tokens(data: Any) -> dict[str, int]:
    """Return the tokens in the JSON of a tokenizer: of tokenizer.json, or a plain mapping."""
    inner = data.get("model", data) if isinstance(data, dict) else {}
    tokens = inner.get("vocab", data) if isinstance(inner, dict) else {}
    if isinstance(tokens, list):  # of a unigram model: pairs of token and score
        return {str(pair[0]): number for number, pair in enumerate(tokens)}
    return {str(token): number for token, number in tokens.items() if isinstance(number, int)}
