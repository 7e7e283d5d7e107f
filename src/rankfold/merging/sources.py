"""What a rule of merging that takes all tensors together sees: the models, read one tensor at a time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
from .agree import require_agreement
from .models import Model, open_model
from .norms import PIECE
from .parts import Parts


class Sources:
    """The models that are merged, and the base from which all were trained where one is given.

    Tensors are read when they are asked for and not kept, in float32, or float64 where one of the models
    stores it so. Use it as a context: what `scratch` gave is removed at its end.

    Args:
        models: modules, or folders of safetensors files.
        base: of the same architecture.
        weights: of each model; None gives 1 to each.
        data: batches for rules that measure, or for each model its own.
        loss: of a model and a batch, likewise.
        seed: of every random choice.
        progress: rules that learn show a bar over their steps.

    Raises:
        Incompatible: there is no model, or two have another architecture or vocabulary.
        InvalidOption: there is not one finite weight for each model.

    Example:
        >>> from torch import nn
        >>> with Sources([nn.Linear(2, 3), nn.Linear(2, 3)], base=nn.Linear(2, 3)) as sources:
        ...     sources.names, sources.parts("weight").deltas.shape
        (('weight', 'bias'), torch.Size([2, 3, 2]))
    """

    def __init__(
        self,
        models: Sequence[nn.Module | str | Path | Model],
        *,
        base: nn.Module | str | Path | Model | None = None,
        weights: Sequence[float] | None = None,
        data: Any = None,
        loss: Callable[..., Tensor] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if not models:
            raise Incompatible("there is no model to merge")
        self.models = tuple(open_model(model, f"model {n}") for n, model in enumerate(models, start=1))
        self.base = None if base is None else open_model(base, "the base")
        self.weights = checked_weights(weights, len(models))
        self.data, self.loss, self.seed, self.progress = data, loss, seed, progress
        self._rooms = contextlib.ExitStack()
        require_agreement([self.origin, *self.models])

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what `scratch` gave."""
        self._rooms.close()

    @property
    def origin(self) -> Model:
        """The base, or the first model where there is none."""
        return self.models[0] if self.base is None else self.base

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are merged, in order: every stored tensor of real numbers, tied ones once."""
        return tuple(name for name, shape in self.origin.tensors.items() if shape.is_merged)

    @property
    def kept(self) -> tuple[str, ...]:
        """The tensors that are taken as they are: integers, and what is packed into them."""
        return tuple(name for name, shape in self.origin.tensors.items() if not shape.is_merged)

    @property
    def count(self) -> int:
        """The number of models, the base not counted."""
        return len(self.models)

    @property
    def has_base(self) -> bool:
        """Whether there is a base."""
        return self.base is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading it."""
        return self.origin.tensors[name].shape

    def read(self, which: int | None, name: str) -> Tensor:
        """Return one tensor of one model, in float32 or better; it must not be changed in place.

        Args:
            which: the model's number, from 0; None is the base.
            name: of the tensor.

        Raises:
            Incompatible: there is no base, or the tensor holds NaN.
        """
        if which is None and self.base is None:
            raise Incompatible(f"{name}: this method merges what was added to a base; pass base=")
        model = self.base if which is None else self.models[which]
        assert model is not None
        tensor = model.read(name)
        precise = tensor.to(self.origin_device(name), self._precision(name))
        if bool(precise.sum().isnan()):  # opposite infinities give it too
            _refuse_nan(model.label, name, precise)
        return precise

    def parts(self, name: str) -> Parts:
        """Return one tensor of all the models.

        Raises:
            Incompatible: it holds NaN in one of them.
        """
        models = tuple(self.read(number, name) for number in range(self.count))
        base = self.read(None, name) if self.has_base else None
        return Parts(name, models, self.weights, base, self.seed)

    def pieces(self, name: str) -> Iterator[Parts]:
        """Yield one tensor of all the models as flat pieces in their order; NaN is not looked for."""
        stored = [model.read(name) for model in ([self.base] if self.base else []) + [*self.models]]
        device, precision = self.origin_device(name), self._precision(name)
        for together in zip(*(tensor.reshape(-1).split(PIECE) for tensor in stored), strict=True):
            models = tuple(piece.to(device, precision) for piece in together)
            base, models = (models[0], models[1:]) if self.has_base else (None, models)
            yield Parts(name, models, self.weights, base, self.seed)

    def taken(self, name: str) -> Tensor:
        """Return a tensor that is not merged: the base's, or the one that all the models have.

        A single number, such as a count of batches seen, is the first model's where there is no base.

        Raises:
            Incompatible: there is no base and the models differ.
        """
        own = self.origin.read(name)
        alike = (torch.equal(own, model.read(name).to(own.device)) for model in self.models[1:])
        if not self.has_base and own.dim() and not all(alike):
            kind = str(own.dtype).removeprefix("torch.")
            raise Incompatible(
                f"{name} ({kind}) differs between the models, and such numbers are not merged; pass base= to "
                "take the base's"
            )
        return own

    def module(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return a live copy of the base, or of the first model, with some of its tensors replaced.

        Args:
            tensors: by name; None replaces none.

        Raises:
            Incompatible: the models are folders whose architecture transformers does not have.
        """
        return self.origin.module(tensors or {})

    def scratch(self) -> Path:
        """Return a new temporary folder, which is removed at the end of the context."""
        room = tempfile.TemporaryDirectory(prefix="rankfold-merge-")
        return Path(self._rooms.enter_context(room))

    def origin_device(self, name: str) -> torch.device:
        """Return the device on which a tensor is merged: that of the base, or of the first model."""
        root = getattr(self.origin, "root", None)
        return torch.device("cpu") if root is None else self.origin.read(name).device

    def _precision(self, name: str) -> torch.dtype:
        kinds = [model.tensors[name].dtype for model in (self.origin, *self.models)]
        return torch.float64 if torch.float64 in kinds else torch.float32


def _refuse_nan(label: str, name: str, tensor: Tensor) -> None:
    count = int(tensor.isnan().sum())
    if count:
        raise Incompatible(f"{label}: {name} holds NaN in {count} of {tensor.numel()} entries")


def checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return a weight for each of what is merged, 1 where none are given.

    Raises:
        InvalidOption: there is not one finite weight for each.
    """
    if weights is None:
        return (1.0,) * count
    if not _are_numbers(weights):
        raise InvalidOption(f"weights must be a list of numbers, one for each model, not {weights!r}")
    if len(weights) != count:
        raise InvalidOption(f"{len(weights)} weights were given for {count} models; give one for each")
    if not all(torch.isfinite(torch.tensor(weight, dtype=torch.float64)) for weight in weights):
        raise InvalidOption(f"the weights {list(weights)} must be finite")
    return tuple(float(weight) for weight in weights)


def _are_numbers(weights: Any) -> bool:
    try:
        return not isinstance(weights, str) and len([float(weight) for weight in weights]) >= 0
    except (TypeError, ValueError):
        return False
