"""Writing a model as safetensors shards, tensor by tensor in any order, without holding a shard in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..errors import Incompatible, InvalidOption
from ..formats.files import write_text
from .models import DTYPE_NAMES, Shape

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the shard's number and the byte at which it starts."""

    shard: int
    start: int


class ShardWriter:
    """Files of safetensors whose tensors are known by shape before the first of them is there.

    Every file is laid out at once, header first, and each tensor is written where it belongs when it comes.
    Within a shard wider types come first, as the format's own writer has them, which keeps every tensor
    aligned to its entries.

    Args:
        folder: an existing folder, in which nothing else is called model*.safetensors.
        tensors: shape and type of everything that will be written, in order.
        largest: bytes of a shard; one tensor that has more is a shard by itself.

    Raises:
        InvalidOption: the size is not positive.
        Incompatible: the format has no name for a type.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> with ShardWriter(folder, {"w": Shape((2,), torch.float32)}) as writer:
        ...     writer.write("w", torch.ones(2))
        >>> load_file(folder / "model.safetensors")
        {'w': tensor([1., 1.])}
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Shape], largest: int = 5 * 10**9) -> None:
        if largest < 1:
            raise InvalidOption(f"a shard must have room for bytes, not {largest}")
        self.folder, self.tensors = folder, dict(tensors)
        self.total = sum(map(_size, tensors.values()))
        shards = list(_split(self.tensors, largest))
        self.files = [folder / _file_name(number, len(shards)) for number in range(len(shards))]
        self.places: dict[str, Place] = {}
        self._missing = set(self.tensors)
        for number, names in enumerate(shards):
            self._lay_out(number, names)
        self._opened = [file.open("r+b") for file in self.files]

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and write the index of several."""
        for file in self._opened:
            file.close()
        if error is None:
            self._finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor.

        Raises:
            Incompatible: it is not one of those announced, or of another shape or type, or came before.
        """
        expected = self.tensors.get(name)
        if expected is None or name not in self._missing:
            raise Incompatible(f"{name} is not a tensor of the models, or came twice")
        if Shape(tuple(tensor.shape), tensor.dtype) != expected:
            raise Incompatible(
                f"{name} came as {tuple(tensor.shape)} {tensor.dtype}, not {expected.shape} {expected.dtype}"
            )
        self.write_flat(name, [tensor.reshape(-1)])

    def write_flat(self, name: str, pieces: Iterable[Tensor]) -> bool:
        """Write a tensor piece by piece.

        Args:
            name: of the tensor.
            pieces: its entries in order, each of one axis and of the tensor's type.

        Returns:
            Whether they were all of it; else it can be written again.
        """
        place, left = self.places[name], torch.Size(self.tensors[name].shape).numel()
        file = self._opened[place.shard]
        file.seek(place.start)
        for piece in pieces:
            file.write(piece.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            left -= piece.numel()
        if not left:
            self._missing.discard(name)
        return not left

    def _lay_out(self, number: int, names: list[str]) -> None:
        ordered = sorted(names, key=lambda name: (-self.tensors[name].dtype.itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in ordered:
            shape = self.tensors[name]
            start, end = end, end + _size(shape)
            header[name] = {
                "dtype": DTYPE_NAMES[shape.dtype],
                "shape": list(shape.shape),
                "data_offsets": [start, end],
            }
            self.places[name] = Place(number, start)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        first = 8 + len(text)
        self.places |= {name: Place(number, first + self.places[name].start) for name in ordered}
        with self.files[number].open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(first + end)

    def _finish(self) -> None:
        if self._missing:
            raise Incompatible(f"the method gave no {min(self._missing)} ({len(self._missing)} are missing)")
        if len(self.files) > 1:
            places = {name: self.files[place.shard].name for name, place in self.places.items()}
            index = {"metadata": {"total_size": self.total}, "weight_map": places}
            write_text(self.folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split(tensors: Mapping[str, Shape], largest: int) -> Iterator[list[str]]:
    """Yield the names of one shard after the other."""
    names: list[str] = []
    room = largest
    for name, shape in tensors.items():
        if names and _size(shape) > room:
            yield names
            names, room = [], largest
        names.append(name)
        room -= _size(shape)
    yield names


def _size(shape: Shape) -> int:
    return torch.Size(shape.shape).numel() * shape.dtype.itemsize


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
