"""Checkpoints of a Trainer that appear complete or not at all, and are not trained beyond their end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rankfold.errors import RankfoldError

FULL = 2**20  # bytes: a disk with less is full


class NotWritten(RankfoldError, OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


def step_of(checkpoint: Path) -> int | None:
    """Return the step of a checkpoint, or None where its name, such as a copy's, is another.

    Example:
        >>> step_of(Path("checkpoint-20")), step_of(Path("checkpoint-20-copy"))
        (20, None)
    """
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else None


class WholeCheckpoints:
    """Goes before a Trainer among the bases of a class: each checkpoint is written aside and then renamed.

    A disk that is full, or a process that is killed, leaves the checkpoints that were there, and no half of
    a new one under a checkpoint's name. A run that is resumed from its last step stays as it is.
    """

    args: Any
    state: Any
    control: Any
    accelerator: Any
    _aside: Path | None = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch, but not one step more where the run that is resumed was at its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        """Return where checkpoints are written."""
        found: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return found if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint aside, let it take its name, and only then delete older ones."""
        folder = Path(self._get_output_dir(trial))
        self._aside = folder / ".partial"
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._settle(self._aside, folder)
        except Exception as error:  # each format's own library has its own exceptions
            raise NotWritten(self._sentence(folder, error)) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._aside, ignore_errors=True)
            self._aside = None

    def _settle(self, aside: Path, folder: Path) -> None:
        """Let what is complete take its name, and delete what is older than is kept."""
        from transformers.trainer_utils import rotate_checkpoints

        for written in aside.glob("checkpoint-*"):
            shutil.rmtree(folder / written.name, ignore_errors=True)
            written.replace(folder / written.name)
        rotate_checkpoints(str(folder), self.args.save_total_limit)

    def _sentence(self, folder: Path, error: Exception) -> str:
        whole = sorted(step for found in folder.glob("checkpoint-*") if (step := step_of(found)) is not None)
        kept = f"; that of step {whole[-1]} is whole, and --resume continues from it" if whole else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        if shutil.disk_usage(folder).free < FULL:  # which not every library that writes says
            reason = f"the disk of {folder} is full"
        return f"the checkpoint of step {self.state.global_step} could not be written: {reason}{kept}"
