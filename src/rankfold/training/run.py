"""One training run: from settings to an adapter in a folder, through transformers' Trainer."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.layers import require, task_heads
from rankfold.methods.attach import attachable
from rankfold.methods.recipe import resolve, split_part
from rankfold.methods.registry import get, needs_of, structure_named
from rankfold.training.config import DEFAULT_EPOCHS, RunConfig
from rankfold.training.folder import RunFolder
from rankfold.training.loop import (
    Notify,
    is_main_process,
    peak_memory,
    runs_on_cpu,
    train,
    training_arguments,
)
from rankfold.training.memory import predict_memory
from rankfold.training.metrics import Score, evaluate, mean_loss
from rankfold.training.prepare import Prepared, prepare
from rankfold.training.report import RunPlan, RunResult

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

AXES = ("structure", "init", "ranks", "dynamics")
CALIBRATION_BATCHES = 32  # that initialisers and rank rules see; the papers take 8 to 256 examples


def recipe(method: str, options: dict[str, Any]) -> rf.Recipe:
    """Return the recipe of the point `method` with `options` by `axis.option` given to its parts.

    Raises:
        UnknownMethod: when a part of the point is no method.
        InvalidOption: when an option's axis has no part in the point.

    Example:
        >>> recipe("dora/pissa", {"structure.alpha": 32}).structure
        ('dora', {'alpha': 32})
    """
    chosen = rf.parse_point(method)
    for key, value in options.items():
        axis, _, option = key.partition(".")
        if axis not in AXES:
            raise InvalidOption(f"{axis!r} in {key!r} is no axis; the axes are {', '.join(AXES)}")
        part = getattr(chosen, axis) or (resolve(chosen, {}).recipe.init if axis == "init" else None)
        if not part:
            raise InvalidOption(f"{key} needs a method on that axis: write {method}/NAME, or leave it out")
        if axis == "dynamics":
            changed: Any = {axis: _with_option(part, option, value)}
        else:
            name, given = split_part(part)
            changed = {axis: (name, {**given, option: value})}
        chosen = replace(chosen, **changed)
    return chosen


def refuse_inputs(point: rf.Recipe) -> None:
    """Refuse a structure whose gate reads what the data of a run cannot give.

    Raises:
        Incompatible: it reads more.
    """
    name, _ = split_part(point.structure)
    inputs = structure_named(name).traits["inputs"]
    if inputs:
        given = ", ".join(f"{each}=..." for each in inputs)
        raise Incompatible(
            f"{name} reads {' and '.join(inputs)}, which no column of the data gives: train it in a loop of "
            f"your own, calling the model within rankfold.gate_inputs(model, {given})"
        )


def _with_option(parts: Sequence[Any], option: str, value: Any) -> tuple[Any, ...]:
    """Give an option to the one dynamics that has it."""
    names = [split_part(part)[0] for part in parts]
    having = [name for name in names if option in get("dynamics", name).options]
    if not having:
        known = [f"{name}: {', '.join(get('dynamics', name).options) or 'none'}" for name in names]
        raise InvalidOption(f"no option of the dynamics is called {option!r}; there are {'; '.join(known)}")
    if len(having) > 1:
        raise InvalidOption(f"{' and '.join(having)} both have an option {option!r}; use rankfold.Recipe")
    return tuple(
        (name, {**split_part(part)[1], option: value}) if name == having[0] else part
        for name, part in zip(names, parts, strict=True)
    )


def plan_run(config: RunConfig) -> RunPlan:
    """Find what `config` would adapt and what that costs; nothing is written and nothing trains."""
    point = recipe(config.method, config.set)
    refuse_inputs(point)
    prepared = prepare(config)
    config = prepared.config
    plan = rf.plan(prepared.base.model, point, **_adapt_arguments(prepared, point))
    longest = max(len(example["input_ids"]) for example in prepared.training)
    memory = predict_memory(prepared.base.model, plan.trainable, config.batch_size * longest)
    examples = len(prepared.training)
    return RunPlan(plan, memory, examples, _steps(config, examples), str(config.task))


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    notify: Notify = lambda message: None,
) -> RunResult:
    """Adapt a model to data and leave the adapter, its settings and its result in `config.out`.

    Args:
        config: what to do.
        resume: continue the run that `config.out` holds; it ends with the weights of one that never stopped.
        overwrite: replace the run that `config.out` holds.
        progress: show a progress bar on the standard error stream.
        notify: is told in a sentence what happens.

    Raises:
        RankfoldError: when the settings, the data, the model or the folder do not allow it.

    Example:
        >>> run(RunConfig(model="gpt2", data="notes.txt", out="notes-lora"))  # doctest: +SKIP
    """
    if config.out is None:
        raise InvalidOption("a run needs a folder for its adapter: name one with --out")
    folder = RunFolder(Path(config.out))
    point = recipe(config.method, config.set)
    refuse_inputs(point)
    if is_main_process():
        folder.check(resume=resume, overwrite=overwrite)
    arguments = _training_arguments(config, folder)
    prepared = prepare(config)
    config = prepared.config
    model: nn.Module = prepared.base.model
    model.to(arguments.device)
    rf.adapt(model, point, **_adapt_arguments(prepared, point))
    _train_in_float32(model)
    if is_main_process():
        folder.start(config, overwrite=overwrite)
    notify(f"{config.task}: {len(prepared.training):,} examples from {config.data}")
    if prepared.base.fresh:
        notify(f"new, so trained whole: {', '.join(prepared.base.fresh)}")
    with rf.disabled(model):
        before = _score(model, prepared)
    notify(f"before: {before} on {prepared.scored_on}")
    trainer = _trainer(model, arguments, prepared, progress)
    seconds = train(trainer, folder.last_checkpoint() if resume else None, notify)
    counts = rf.summary(model)
    result = RunResult(
        config,
        folder.path,
        counts.trainable,
        counts.total,
        trainer.state.global_step,
        seconds,
        peak_memory(arguments.device),
        before,
        _score(model, prepared),
        prepared.scored_on,
    )
    if trainer.is_world_process_zero():
        folder.finish(lambda path: rf.save(model, path, notes=result.facts), result.to_dict())
    return result


def _adapt_arguments(prepared: Prepared, point: rf.Recipe) -> dict[str, Any]:
    """Return what `rf.adapt` and `rf.plan` are told beside model and method."""
    config, resolved = prepared.config, resolve(point, {})
    reads_data = any(
        needs_of(m, o, 1)
        for m, o in (
            (resolved.structure, resolved.options),
            (resolved.init, resolved.init_options),
            (resolved.ranks, resolved.ranks_options),
        )
    )
    reads_rate = resolved.init is not None and resolved.init.traits["rate"]
    return {
        "rank": config.rank,
        "targets": list(config.targets) if len(config.targets) > 1 else next(iter(config.targets), None),
        "seed": config.seed,
        "train": tuple(dict.fromkeys((*config.train, *_fresh(prepared)))),
        "data": _calibration(prepared) if reads_data else None,
        "lr": config.lr if reads_rate else None,
    }


def _calibration(prepared: Prepared) -> list[dict[str, Any]]:
    """Return the first batches of the training examples."""
    size, examples = prepared.config.batch_size, prepared.training
    starts = range(0, min(len(examples), CALIBRATION_BATCHES * size), size)
    return [prepared.collate(list(examples[start : start + size])) for start in starts]


def _fresh(prepared: Prepared) -> list[str]:
    """Return the modules that started at random; those of the task head train whole anyway."""
    heads = task_heads(prepared.base.model)
    return [path for path in prepared.base.fresh if path.split(".")[0] not in heads]


def _train_in_float32(model: "nn.Module") -> None:
    """Keep what trains whole in float32 beside a half-precision base: small steps would round away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _training_arguments(config: RunConfig, folder: RunFolder) -> "TrainingArguments":
    if config.dtype == "float16" and runs_on_cpu(config.device):
        raise InvalidOption("dtype float16 trains on a GPU only; choose bfloat16 or float32")
    return training_arguments(
        config,
        folder.checkpoints,
        num_train_epochs=config.epochs or DEFAULT_EPOCHS,
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
    )


def _trainer(
    model: "nn.Module", arguments: "TrainingArguments", prepared: Prepared, progress: bool
) -> "Trainer":
    from transformers import PrinterCallback

    from rankfold.training.progress import ProgressBar
    from rankfold.training.routed import routed_trainer
    from rankfold.training.whole import WholeCheckpoints

    class RunTrainer(WholeCheckpoints, routed_trainer()):  # type: ignore[misc]
        """The Trainer of a run."""

    moving = attachable(require(model))[1] is not None
    trainer = RunTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared.training,
        data_collator=prepared.collate,
        compute_loss_func=mean_loss,
        callbacks=[*([ProgressBar()] if progress else []), *([rf.TrainerCallback()] if moving else [])],
        optimizers=(_optimizer(model, arguments) if moving else None, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _optimizer(model: "nn.Module", arguments: "TrainingArguments") -> torch.optim.Optimizer:
    """Return AdamW over the groups that the adapter's dynamics need."""
    groups = rf.param_groups(model, arguments.learning_rate, weight_decay=arguments.weight_decay)
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas, eps=arguments.adam_epsilon)


def _score(model: "nn.Module", prepared: Prepared) -> Score:
    config = prepared.config
    autocast = None if config.dtype == "float32" else getattr(torch, config.dtype)
    return evaluate(model, prepared.scored, prepared.collate, batch_size=config.batch_size, autocast=autocast)


def _steps(config: RunConfig, examples: int) -> int:
    """Return the optimizer steps of a run on one device."""
    per_epoch = math.ceil(math.ceil(examples / config.batch_size) / config.accumulate)
    return config.steps or math.ceil(per_epoch * (config.epochs or DEFAULT_EPOCHS))
