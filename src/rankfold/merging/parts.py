"""What a rule of merging sees: one tensor of all the models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import Incompatible
from ..optim.seeds import hashed


@dataclass(frozen=True, eq=False)
class Parts:
    """One tensor of all the models that are merged, in float32 or better.

    Attributes:
        name: of the tensor.
        models: of each model.
        weights: of each model, as they were asked for; 1 where none were.
        base: of the model from which all were trained, or None where none is given.
        seed: of every random choice.
    """

    name: str
    models: tuple[Tensor, ...]
    weights: tuple[float, ...]
    base: Tensor | None = None
    seed: int = 0

    @property
    def origin(self) -> Tensor:
        """The base's tensor.

        Raises:
            Incompatible: none is given.
        """
        if self.base is None:
            raise Incompatible(f"{self.name}: this method merges what was added to a base; pass base=")
        return self.base

    @cached_property
    def deltas(self) -> Tensor:
        """The task vectors, model minus base, stacked: (models, *shape)."""
        return torch.stack([model - self.origin for model in self.models])

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor has two axes of more than one entry."""
        shape = self.models[0].shape
        return len(shape) == 2 and min(shape) > 1

    def spread(self) -> Tensor:
        """Return the weights (models, 1, ...) such that they multiply what is stacked."""
        first = self.models[0]
        weights = torch.tensor(self.weights, dtype=first.dtype, device=first.device)
        return weights.reshape(-1, *[1] * first.dim())

    def generator(self, *names: str | int) -> torch.Generator:
        """Return a generator seeded by the seed, the tensor's name, and further names."""
        return torch.Generator().manual_seed(hashed(self.seed, self.name, *names))
