"""Paired times, bytes kept for backward, peak memory, and the header that says what they were measured on."""

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], object]
MEGA = 1e6


def print_header(title: str, *explanation: str) -> None:
    print(f"\n{title}")
    for line in explanation:
        print(f"  {line}")
    threads = torch.get_num_threads()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"  on {processor()}, {threads} threads, Python {platform.python_version()}, {packages}\n")


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x {os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"


def cpu_seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def paired_ratios(floor: Step, steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median over the rounds of each step's CPU time over that of a floor step run right beside it."""
    for step in (floor, *steps.values()):
        step()
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name, step in steps.items():
            first, second = (floor, step) if turn % 2 else (step, floor)
            times = {id(each): cpu_seconds(each) for each in (first, second)}
            ratios[name].append(times[id(step)] / times[id(floor)])
    return {name: statistics.median(values) for name, values in ratios.items()}


def saved_megabytes(forward: Step, excluded: Iterable[Tensor]) -> float:
    """Megabytes that autograd keeps for backward; memory shared by several tensors counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # as long as the result lives, no address is used twice
    del kept
    return sum(found.values()) / MEGA


def peak_megabytes(step: Step) -> float | None:
    """Megabytes by which a step raises resident memory at its peak; None where the system does not say."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not os.access(reset, os.W_OK):
        return None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5", encoding="ascii")
    before = _resident(status, "VmRSS")
    step()
    return _resident(status, "VmHWM") - before


def _resident(status: Path, key: str) -> float:
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / MEGA
