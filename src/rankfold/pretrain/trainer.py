"""transformers' Trainer as a pretraining run uses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import rankfold as rf
from rankfold.errors import Incompatible, RankfoldError
from rankfold.layers import adaptation_of, require
from rankfold.methods.attach import attachable
from rankfold.pretrain.config import PretrainConfig
from rankfold.pretrain.memory import Watched, kept_for_backward
from rankfold.pretrain.sharded import ShardedTraining
from rankfold.training.loop import training_arguments
from rankfold.training.packed import Packed, collate
from rankfold.training.routed import routed_trainer
from rankfold.training.whole import WholeCheckpoints

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer
    from transformers import Trainer, TrainingArguments

DEFAULT_EPOCHS = 1.0


class Diverged(RankfoldError, ArithmeticError):
    """The loss is no longer a number."""


def arguments_of(config: PretrainConfig, checkpoints: Path) -> TrainingArguments:
    """Return the Trainer's arguments.

    Raises:
        InvalidOption: when the device is not there.
    """
    return training_arguments(
        config,
        checkpoints,
        num_train_epochs=config.epochs or DEFAULT_EPOCHS,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.floor},
        warmup_steps=config.warmup,  # below 1: a share of the run
        max_grad_norm=config.clip,
        bf16=config.dtype == "mixed",
        torch_compile=config.compile,
        gradient_checkpointing=config.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=None if config.structure else False,
        eval_strategy="steps",
        eval_steps=config.eval_steps or 0.1,
        eval_on_start=True,
        per_device_eval_batch_size=config.batch_size,
        prediction_loss_only=True,
        logging_nan_inf_filter=False,
        dataloader_drop_last=True,  # every step is of one size
    )


def trainer_of(
    model: nn.Module,
    arguments: TrainingArguments,
    make: Callable[[nn.Module], Optimizer],
    data: tuple[Packed, Packed],
    watched: Watched,
    *,
    shards: bool,
    steps_in_backward: bool = False,
    progress: bool,
) -> Trainer:
    """Return the Trainer of a run.

    Args:
        model: as it starts.
        arguments: the Trainer's.
        make: makes the optimizer of a model.
        data: the sequences to train on, and those of the perplexity.
        watched: counts memory.
        shards: shard the model over the processes.
        steps_in_backward: let the optimizer step in the backward pass.
        progress: show a progress bar.

    Raises:
        Incompatible: a structure has dynamics, and the model is to be sharded.
    """
    from transformers import PrinterCallback

    from rankfold.training.progress import ProgressBar

    callbacks: list[Any] = [watched.callback(), _stop_where_diverged()]
    callbacks += [ProgressBar("pretraining")] if progress else []
    if adaptation_of(model) is not None and attachable(require(model))[1] is not None:
        if steps_in_backward:
            raise Incompatible("dynamics act on all gradients at once; leave --step-in-backward out")
        if shards:
            raise Incompatible("dynamics and dynamic ranks do not act on sharded weights; leave --fsdp out")
        callbacks.append(rf.TrainerCallback())
    trainer: Any = _trainer_class(make, watched)(
        model=model,
        args=arguments,
        train_dataset=data[0],
        eval_dataset=data[1],
        data_collator=collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.shards, trainer.steps_in_backward = shards, steps_in_backward
    made: Trainer = trainer
    return made


def _trainer_class(make: Callable[[nn.Module], Optimizer], watched: Watched) -> type[Trainer]:
    class PretrainTrainer(ShardedTraining, WholeCheckpoints, routed_trainer()):  # type: ignore[misc]
        """Makes its own optimizer, and counts what its first forward pass keeps."""

        def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
            """Make the optimizer when the Trainer wants it: after a model is loaded, before it is sharded."""
            held: Optimizer | None = getattr(self, "optimizer", None)
            of = self.model if model is None else model
            made = held or make(of)
            if held is None and self.steps_in_backward:
                watched.watch_backward(of)
                made.step_in_backward()  # type: ignore[attr-defined]
            self.optimizer = made
            return made

        def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
            """Return all that the perplexity is measured on, a last batch that is not full too."""
            self.args.dataloader_drop_last = False
            try:
                return super().get_eval_dataloader(*args, **kwargs)
            finally:
                self.args.dataloader_drop_last = True

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """Return the loss; of the first forward pass of training, count what it keeps."""
            plain = not (self.shards or self.args.torch_compile or self.args.gradient_checkpointing)
            if not (plain and model.training and watched.activations is None):
                return super().compute_loss(model, inputs, *args, **kwargs)
            with kept_for_backward(model) as kept:
                loss = super().compute_loss(model, inputs, *args, **kwargs)
            watched.activations = sum(kept.values())
            return loss

    return PretrainTrainer


def _stop_where_diverged() -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        """Ends a run whose loss is no number."""

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Look at the loss."""
            if not math.isfinite(kwargs["logs"].get("loss", 0.0)):
                raise Diverged(
                    f"the loss is not finite at step {state.global_step}: lower --lr or --clip, or raise "
                    "--warmup"
                )

    return Stop()


def curves(history: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, list[dict[str, float]]]:
    """Return the training losses and the held-out perplexities by step.

    Args:
        history: of the Trainer's state.
        tokens: per optimizer step.

    Example:
        >>> curves([{"step": 2, "loss": 1.5, "learning_rate": 0.1}, {"step": 2, "eval_loss": 0.0}], 10)
        {'train': [{'step': 2, 'tokens': 20, 'loss': 1.5, 'lr': 0.1}],
         'held_out': [{'step': 2, 'tokens': 20, 'loss': 0.0, 'perplexity': 1.0}]}
    """
    train = [
        {"step": e["step"], "tokens": e["step"] * tokens, "loss": e["loss"], "lr": e["learning_rate"]}
        for e in history
        if "loss" in e
    ]
    held_out = {
        e["step"]: {
            "step": e["step"],
            "tokens": e["step"] * tokens,
            "loss": e["eval_loss"],
            "perplexity": math.exp(min(e["eval_loss"], 700.0)),
        }
        for e in history
        if "eval_loss" in e
    }
    return {"train": train, "held_out": list(held_out.values())}
