"""A progress bar of one line, with the speed, the loss and the learning rate."""

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState


class ProgressBar(TrainerCallback):
    """Shows a run of `transformers.Trainer` on the standard error stream; only the first process shows it.

    Args:
        doing: what it does, in a word.
    """

    def __init__(self, doing: str = "adapting") -> None:
        self.bar: Any = None
        self.doing = doing
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the bar, at the step that a resumed run continues from."""
        if state.is_world_process_zero:
            pause = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file needs few lines
            done, total = state.global_step, state.max_steps
            self.bar = tqdm(desc=self.doing, initial=done, total=total, unit=" steps", mininterval=pause)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Advance."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show the newest loss and learning rate, and the newest loss on text that is held out."""
        logs = kwargs["logs"]
        if "loss" in logs:
            self.shown["loss"] = f"loss {logs['loss']:.4g}, lr {logs['learning_rate']:.2g}"
        if "eval_loss" in logs:
            self.shown["held out"] = f"held out {logs['eval_loss']:.4g}"
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(self.shown.values()), refresh=False)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands, and its line, also where the run ends before its time."""
        if self.bar is not None:
            self.bar.close()
