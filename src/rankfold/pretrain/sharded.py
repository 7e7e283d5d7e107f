"""Training with weights, gradients and optimizer state sharded over processes, by PyTorch's FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankfold.errors import Incompatible
from rankfold.formats.files import write_tensors
from rankfold.optim import unwrapped

if TYPE_CHECKING:
    from torch.optim import Optimizer

SCHEDULER = "scheduler.pt"
WEIGHTS = "model.safetensors"


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model over all processes, in place: its blocks one by one, then what is around them.

    Args:
        model: a model of transformers, which says what its blocks are.
        device: that it is on.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint in one piece, in the first process; every process has to call it."""
    whole = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
    return whole if torch.distributed.get_rank() == 0 else {}


def local_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state with this process's shards as plain tensors."""
    stored: dict[str, Any] = optimizer.state_dict()
    states = {
        number: {key: _local(value) for key, value in state.items()}
        for number, state in stored["state"].items()
    }
    return {**stored, "state": states}


def load_local_state(optimizer: Optimizer, stored: dict[str, Any]) -> None:
    """Load what `local_state` returned in the same process of as many."""
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: _sharded_like(parameter, stored["state"][number])
        for number, parameter in zip(numbers, held, strict=True)
        if number in stored["state"]
    }
    optimizer.load_state_dict({**stored, "state": states})


def _local(value: Any) -> Any:
    """Return the shard of a sharded tensor with how it is one; anything else as it is."""
    if not hasattr(value, "to_local"):
        return value
    # The axis that each axis of the mesh cuts, or -1 where it repeats the tensor.
    axes = [getattr(placement, "dim", -1) for placement in value.placements]
    return {"shard": value.to_local(), "axes": axes, "shape": list(value.shape), "stride": value.stride()}


def _sharded_like(parameter: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as it was, on the processes that hold the parameter."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def restored(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return DTensor.from_local(
            value["shard"].to(parameter.device),
            parameter.device_mesh,
            [Replicate() if axis < 0 else Shard(axis) for axis in value["axes"]],
            shape=torch.Size(value["shape"]),
            stride=tuple(value["stride"]),
        )

    return {key: restored(value) for key, value in state.items()}


class ShardedTraining:
    """Goes before a Trainer among the bases of a class: shards the model when training begins.

    The Trainer's own way needs accelerators; this one is PyTorch's on any device.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    shards: bool = False

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Shard the model, whose weights are loaded where training resumes, before its optimizer is made."""
        if self.shards:
            shard(self.model, self.args.device)
            self.is_distributed_loading_by_transformers = True  # so that it is not wrapped again
        return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model of a checkpoint."""
        if not self.shards:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        state, folder = full_state(self.model), Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            write_tensors(folder / WEIGHTS, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the optimizer's state, every process its shards."""
        if not self.shards:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        torch.save(local_state(unwrapped(self.optimizer)), self._shard_file(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's state, every process its shards."""
        if not self.shards or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        file = self._shard_file(checkpoint)
        if not file.is_file():
            raise Incompatible(
                f"{checkpoint} was not written by {self.args.world_size} processes that shard: go on with as "
                "many as the run began with, with --fsdp if it had it"
            )
        load_local_state(unwrapped(self.optimizer), torch.load(file, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _shard_file(self, folder: str) -> Path:
        return Path(folder) / f"optimizer-{self.args.process_index}-of-{self.args.world_size}.pt"
