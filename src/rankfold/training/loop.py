"""What every run has around transformers' Trainer: its arguments, the training itself, and what that took."""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rankfold.errors import InvalidOption

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

Notify = Callable[[str], None]


class Settings(Protocol):
    """What the settings of every run say of its training; see `RunConfig`."""

    @property
    def lr(self) -> float | None: ...  # noqa: D102
    @property
    def epochs(self) -> float | None: ...  # noqa: D102
    @property
    def steps(self) -> int | None: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def accumulate(self) -> int: ...  # noqa: D102
    @property
    def save_steps(self) -> int | None: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102


def training_arguments(config: Settings, checkpoints: Path, **further: Any) -> "TrainingArguments":
    """Return the Trainer's arguments for a run.

    Args:
        config: the settings.
        checkpoints: the folder of the checkpoints.
        further: arguments of `TrainingArguments`.

    Raises:
        InvalidOption: when the device is not there.
    """
    from transformers import TrainingArguments

    on_cpu = runs_on_cpu(config.device)
    given: dict[str, Any] = {
        "learning_rate": config.lr,
        "num_train_epochs": config.epochs or 1.0,
        "max_steps": config.steps or -1,
        **further,
    }
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        seed=config.seed,
        use_cpu=on_cpu,
        save_steps=config.save_steps or 0.1,  # below 1: a share of the run
        save_total_limit=2,
        logging_steps=0.01,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        **given,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are torchrun's, never DataParallel's copies
    return arguments


def runs_on_cpu(device: str) -> bool:
    """Say whether a run on `auto`, `cpu` or `cuda` uses no GPU.

    Raises:
        InvalidOption: when a GPU is asked for and there is none.
    """
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise InvalidOption("device is cuda and there is no GPU that torch can use; choose cpu")
    return device == "cpu" or (device == "auto" and not gpu)


def train(trainer: "Trainer", checkpoint: Path | None, notify: Notify) -> float:
    """Train from `checkpoint`, or from the start, and return the seconds."""
    from rankfold.training.progress import ProgressBar

    if checkpoint is not None:
        notify(f"resuming from {checkpoint.name}")
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        for bar in trainer.callback_handler.callbacks:
            if isinstance(bar, ProgressBar):
                bar.close()  # one that stays open takes the line of what is said next
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use: of the GPU where it is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_main_process() -> bool:
    """Say whether this process writes and speaks: the only one, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
