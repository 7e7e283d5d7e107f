"""A progress bar of one line, with the speed, the loss and the learning rate."""

import sys
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]  # published without types
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """Shows a run of `transformers.Trainer` on the standard error stream; only the first process shows it."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step that a resumed run continues from."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="adapting",
                unit=" steps",
                mininterval=0.2 if sys.stderr.isatty() else 10.0,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss and learning rate."""
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.4g}, lr {logs['learning_rate']:.2g}", refresh=False
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
