"""What methods that train in several processes ask of torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor


def processes() -> tuple[int, int]:
    """Return the number of this process and how many there are: 0 and 1 without torch.distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(part: Tensor, axis: int) -> Tensor:
    """Return the parts of all processes side by side along an axis, in the order of the processes."""
    count = processes()[1]
    if count == 1:
        return part
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(count)]
    torch.distributed.all_gather(parts, part)
    return torch.cat(parts, axis)


def copy_from_first(parameters: list[Tensor]) -> None:
    """Give parameters the values that they have in the first process."""
    if processes()[1] > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.detach(), 0)


def average_gradients(parameters: list[Tensor]) -> None:
    """Replace gradients by their mean over processes; a process without one counts as zero."""
    count = processes()[1]
    if count == 1 or not parameters:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    torch.distributed.all_reduce(present)
    for parameter, holders in zip(parameters, present.tolist(), strict=True):
        if holders:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.distributed.all_reduce(gradient)
            parameter.grad = gradient / count
