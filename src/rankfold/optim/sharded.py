"""Weights whose numbers are spread over processes as DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .matrices import BASIS, Layout, State, Work, floating, matrix_shape


class ShardedLayout(Layout):
    """A weight of which every process holds a part.

    Column by column, moments are shards of (r, n), and the basis is kept as a shard of its rows and gathered
    for the step. Otherwise every process computes with the whole gradient and keeps the whole state.
    """

    is_sharded = True

    def __init__(self, group: dict[str, Any], parameter: Tensor, columnwise: bool) -> None:
        super().__init__(group, parameter)
        assert isinstance(parameter, DTensor)
        self.mesh, self.placements = parameter.device_mesh, tuple(parameter.placements)
        self.shape = matrix_shape(parameter) if self.projected else tuple(parameter.shape)
        shards = [at for at, each in enumerate(self.placements) if not isinstance(each, Replicate)]
        self.axis = shards[0] if shards else None  # of the mesh, over which the weight is spread
        self.spread = columnwise and len(shards) == 1 and self._is_simple(self.placements[shards[0]])
        across = 1 if self.left else 0
        own = tuple(self.placements)
        self.columns = self._with(Shard(across)) if self.projected else own
        if not self.spread:
            self.columns = (Replicate(),) * self.mesh.ndim

    def _is_simple(self, placement: Placement) -> bool:
        """Tell whether a shard of the parameter is one of the matrix."""
        if type(placement) is not Shard:
            return False
        return placement.dim == 0 or self.parameter.dim() == 2 or not self.projected

    def _with(self, placement: Placement) -> tuple[Placement, ...]:
        return tuple(placement if at == self.axis else each for at, each in enumerate(self.placements))

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return this process's columns of G, or all of them."""
        if not self.spread:
            return self.whole(gradient)
        assert isinstance(gradient, DTensor)
        local = floating(gradient.redistribute(self.mesh, self.placements).to_local())
        return self._turned(self._moved(self._as_matrix(local), self.placements, self.columns))

    def local(self, gradient: Tensor) -> Tensor:
        """Return the entries of the gradient that are in this process."""
        assert isinstance(gradient, DTensor)
        return gradient.to_local()

    def whole(self, gradient: Tensor) -> Tensor:
        """Return all of G."""
        assert isinstance(gradient, DTensor)
        return self.turned(floating(gradient.full_tensor()))

    def opened(self, state: State) -> State:
        """Return this process's parts, and the whole basis."""
        self._given = {key: _here(key, value) for key, value in state.items()}
        return dict(self._given)

    def close(self, state: State, opened: State) -> None:
        """Put back what has changed; what is spread is kept as a DTensor."""
        for key in state.keys() - opened.keys():
            del state[key]
        for key, value in opened.items():
            if value is not self._given.get(key):
                state[key] = self._kept(key, value)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over processes that hold other columns."""
        if self.spread and self.axis is not None:
            value = value.clone()
            dist.all_reduce(value, group=self.mesh.get_group(self.axis))
        return value

    def begin(self, group: dict[str, Any], state: State) -> tuple[Tensor, Tensor]:
        """Return this process's part of the weight, and what a change is added to."""
        assert isinstance(self.parameter, DTensor)
        base = self._full(group, state, self.parameter.to_local())
        if self.spread and self.columns == self.placements:
            return base, self._turned(self._as_matrix(base))
        shape = self._local(self.shape, self.columns)
        return base, self._turned(torch.zeros(shape, dtype=floating(base).dtype, device=base.device))

    def end(self, work: Work, state: State, base: Tensor, target: Tensor) -> None:
        """Bring the change to where the weight is."""
        assert isinstance(self.parameter, DTensor)
        if not (self.spread and self.columns == self.placements):
            change = target if self.left or not self.projected else target.T
            base.add_(self._home(change).reshape(base.shape))
        self._store(work, state, base, self.parameter.to_local())

    def _home(self, change: Tensor) -> Tensor:
        """Return this process's part of a change that is spread by columns, or whole in every process."""
        if self.spread:
            return self._moved(change.contiguous(), self.columns, self.placements)
        whole = (Replicate(),) * self.mesh.ndim
        shaped = DTensor.from_local(change.reshape(self.parameter.shape), self.mesh, whole, run_check=False)
        return shaped.redistribute(self.mesh, self.placements).to_local()

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix if self.left or not self.projected else matrix.T

    def _as_matrix(self, local: Tensor) -> Tensor:
        return local.reshape(self._local(self.shape, self.placements)) if self.projected else local

    def _moved(self, local: Tensor, old: Sequence[Placement], new: Sequence[Placement]) -> Tensor:
        if tuple(old) == tuple(new):
            return local
        return self._spread(local, self.shape, old).redistribute(self.mesh, new).to_local()

    def _spread(self, local: Tensor, shape: Sequence[int], placements: Sequence[Placement]) -> DTensor:
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(
            local.contiguous(), self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def _local(self, shape: Sequence[int], placements: Sequence[Placement]) -> tuple[int, ...]:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        return tuple(compute_local_shape_and_global_offset(tuple(shape), self.mesh, placements)[0])

    def _kept(self, key: str, value: Tensor) -> Tensor:
        """Return a tensor as it is kept in the state."""
        if key == "master":
            return self._spread(value, self.parameter.shape, self.placements)
        if not self.spread or value.dim() == 0 or not value.is_floating_point():
            return value
        if key.startswith(BASIS):
            return self._basis(value) if value.dim() == 2 else value
        across = self._with(Shard(1)) if self.projected else self.placements
        return self._spread(value, self.low, across)

    def _basis(self, value: Tensor) -> Tensor:
        whole = self._spread(value, value.shape, (Replicate(),) * self.mesh.ndim)
        return whole.redistribute(self.mesh, self._with(Shard(0)))

    def _place(self) -> tuple[int, ...]:
        return () if self.axis is None else (self.mesh.get_local_rank(self.axis),)


def _here(key: str, value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    return value.full_tensor() if key.startswith(BASIS) else value.to_local()
