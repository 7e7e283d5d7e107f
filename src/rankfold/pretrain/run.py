"""One pretraining run: from settings to a trained model in a folder, through transformers' Trainer."""

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.formats.files import write_json
from rankfold.layers import adaptation_of
from rankfold.pretrain.config import PretrainConfig
from rankfold.pretrain.finish import RESULTS, whole_model
from rankfold.pretrain.memory import Watched, predict
from rankfold.pretrain.model import start, structure_point, structured
from rankfold.pretrain.optimizers import OptimizerPlan, describe_optimizer
from rankfold.pretrain.prepare import Prepared, prepare
from rankfold.pretrain.report import PretrainPlan, PretrainResult, draw_curves
from rankfold.pretrain.trainer import DEFAULT_EPOCHS, arguments_of, curves, trainer_of
from rankfold.training.base import silence
from rankfold.training.data import DataError
from rankfold.training.finished import RECORD, fold_where_possible, save_finished
from rankfold.training.folder import RunFolder
from rankfold.training.loop import Notify, is_main_process, peak_memory, runs_on_cpu, train
from rankfold.training.metrics import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

FACTS, RESULT = "text.json", "result.json"
LAUNCHER_SHARDS = "ACCELERATE_USE_FSDP"  # is set by `accelerate launch --use_fsdp`
WIDTHS = {"float32": 4, "bfloat16": 2, "mixed": 2}  # bytes of a number that is computed with


def plan_pretraining(config: PretrainConfig) -> PretrainPlan:
    """Find what `config` would train and what that costs; nothing is written and nothing trains.

    Without a structure the weights are never made, so that the largest sizes can be planned anywhere.
    """
    point = structure_point(config)
    prepared = prepare(config)
    model = _begin(prepared, point, None if point else "meta")
    return _plan(model, prepared, _processes(), _shards(config))


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    notify: Notify = lambda message: None,
) -> PretrainResult:
    """Train a language model from scratch and leave it, its settings and its result in `config.out`.

    Args:
        config: what to do.
        resume: continue the run that `config.out` holds; it ends with the weights of one that never stopped.
        overwrite: replace the run that `config.out` holds.
        progress: show a progress bar on the standard error stream.
        notify: is told in a sentence or a table what happens.

    Raises:
        RankfoldError: when the settings, the text, the model or the folder do not allow it.

    Example:
        >>> pretrain(PretrainConfig("1M", out="run", optimizer="galore", steps=500))  # doctest: +SKIP
    """
    if config.out is None:
        raise InvalidOption("a run needs a folder for its model: name one with --out")
    folder = RunFolder(Path(config.out), PretrainConfig, RECORD, RESULTS)
    point, shards = structure_point(config), _shards(config)
    if is_main_process():
        folder.check(resume=resume, overwrite=overwrite)
    if shards and _processes() == 1:
        raise InvalidOption(
            "fsdp shards over processes: start them with torchrun --nproc-per-node N -m rankfold pretrain ..."
        )
    runs_on_cpu(config.device)  # or is refused before the text is read
    prepared = prepare(config)
    begin, watched = partial(_begin, prepared, point), Watched()
    trainer, plan = _ready(begin(), prepared, folder.checkpoints, watched, shards, progress)
    if is_main_process():
        folder.start(prepared.config, overwrite=overwrite)
        _same_text(folder.path / FACTS, prepared.facts)
    notify(str(plan))
    checkpoint = folder.last_checkpoint() if resume else None
    result = _trained(trainer, plan, prepared, checkpoint, watched, notify)
    finished = whole_model(trainer, shards, begin)
    if finished is None or not trainer.is_world_process_zero():
        return result
    earlier = {} if result.trained_tokens else _earlier(folder)
    result = replace(
        result, numbers=rf.count(finished), reason=fold_where_possible(finished), earlier=earlier
    )
    _leave(folder, finished, prepared, trainer, result, notify)
    return result


def _ready(
    model: "PreTrainedModel",
    prepared: Prepared,
    checkpoints: Path,
    watched: Watched,
    shards: bool,
    progress: bool,
) -> "tuple[Trainer, PretrainPlan]":
    """Return the Trainer of a model as it starts, and what it is about to do."""
    os.environ.pop(LAUNCHER_SHARDS, None)  # so that the model is sharded once
    arguments = arguments_of(prepared.config, checkpoints)
    model.to(arguments.device)  # type: ignore[arg-type]
    plan = _plan(model, prepared, arguments.world_size, shards)
    make = OptimizerPlan.of(model, prepared.config).build
    data = (prepared.training, prepared.scored(arguments.world_size))
    trainer = trainer_of(
        model, arguments, make, data, watched, shards=shards, progress=progress,
        steps_in_backward=prepared.config.step_in_backward,
    )  # fmt: skip
    return trainer, plan


def _trained(
    trainer: "Trainer",
    plan: PretrainPlan,
    prepared: Prepared,
    checkpoint: Path | None,
    watched: Watched,
    notify: Notify,
) -> PretrainResult:
    """Train, and return what was measured."""
    trainer.args.eval_on_start = checkpoint is None
    with silence():
        seconds = train(trainer, checkpoint, notify)
        after = _last_score(trainer, prepared)
    done = trainer.state.global_step - (_step_of(checkpoint) if checkpoint else 0)
    return PretrainResult(
        plan,
        Path(str(plan.config.out)),
        seconds,
        done * (plan.tokens // plan.steps),
        watched.result(trainer.model),  # type: ignore[arg-type]
        peak_memory(trainer.args.device),
        _score(trainer, prepared, 0),
        after,
        None,
    )


def _begin(prepared: Prepared, point: rf.Recipe | None, device: str | None = None) -> "PreTrainedModel":
    """Return the model as it starts, with its structure."""
    model = start(prepared.found, prepared.config, device)
    if point is not None:
        structured(model, point, prepared.config, prepared.batches())
    return model


def _leave(
    folder: RunFolder,
    model: "PreTrainedModel",
    prepared: Prepared,
    trainer: "Trainer",
    result: PretrainResult,
    notify: Notify,
) -> None:
    """Write the model, the curves and the result, all at once."""
    plan = result.plan
    found = curves(trainer.state.log_history, plan.tokens // plan.steps)
    drawn = importlib.util.find_spec("matplotlib") is not None

    def save(path: Path) -> None:
        save_finished(model, prepared.tokenizer, path, result.facts)
        write_json(path / "metrics.json", found)
        if drawn:
            draw_curves(found, plan.title, path / "loss.png")

    with silence():
        folder.finish(save, result.to_dict())
    if not drawn:
        notify("no picture of the loss was drawn: pip install 'rankfold[plots]'")


def _earlier(folder: RunFolder) -> dict[str, Any]:
    """Return what the run that a folder holds had measured, which no step is left to measure again."""
    file = folder.path / RESULT
    if not file.is_file():
        return {}
    before = json.loads(file.read_text(encoding="utf-8"))
    measured = ("seconds", "tokens_per_second", "memory", "peak_memory", "before")
    return {key: before[key] for key in measured if key in before}


def _plan(model: "PreTrainedModel", prepared: Prepared, processes: int, shards: bool) -> PretrainPlan:
    config = prepared.config
    make = OptimizerPlan.of(model, config)
    steps = _steps(config, len(prepared.training), processes)
    optimizer = make.build(model)
    if config.step_in_backward and (processes > 1 or not hasattr(optimizer, "step_in_backward")):
        raise InvalidOption(
            f"step_in_backward is for one process and projected optimizers, such as galore, not "
            f"{config.optimizer} in {processes}"
        )
    memory = predict(
        model,
        make.small,
        config.batch_size * config.length,
        WIDTHS[config.dtype],
        checkpointing=config.checkpointing,
        one_by_one=config.step_in_backward,
    )
    adaptation = adaptation_of(model)
    return PretrainPlan(
        config=config,
        parameters=sum(p.numel() for p in start(prepared.found, config, "meta").parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        modules=0 if adaptation is None else len(adaptation.adapter().paths),
        optimizer=describe_optimizer(optimizer, config.optimizer),
        text=prepared.facts,
        steps=steps,
        tokens=steps * config.batch_size * config.accumulate * config.length * processes,
        memory=memory.shared(processes) if shards else memory,
    )


def _steps(config: PretrainConfig, sequences: int, processes: int) -> int:
    """Return the optimizer steps of a run; a batch that is not full is left out."""
    batches = sequences // (config.batch_size * processes)
    if not batches:
        raise DataError(
            f"the text gives {sequences:,} sequences of {config.length} tokens, fewer than a batch of "
            f"{config.batch_size * processes}: give more text, or a smaller --batch-size or --length"
        )
    return config.steps or math.ceil(
        math.ceil(batches / config.accumulate) * (config.epochs or DEFAULT_EPOCHS)
    )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _shards(config: PretrainConfig) -> bool:
    """Say whether weights are sharded, by this run or by accelerate's launcher."""
    return config.fsdp or os.environ.get(LAUNCHER_SHARDS, "").lower() in ("1", "true")


def _same_text(file: Path, facts: Mapping[str, Any]) -> None:
    """Write what the text is, or refuse another one than the run began with."""
    if not file.is_file():
        write_json(file, facts)
    elif json.loads(file.read_text(encoding="utf-8"))["sha256"] != facts["sha256"]:
        raise InvalidOption(
            f"the text is not the one that the run in {file.parent} began with; a resumed run keeps its text"
        )


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _last_score(trainer: "Trainer", prepared: Prepared) -> Score:
    """Return the perplexity after the last step, measured where it has not been."""
    found = _score(trainer, prepared, trainer.state.global_step)
    if found is None:
        trainer.evaluate()
        found = _score(trainer, prepared, trainer.state.global_step)
    assert found is not None
    return found


def _score(trainer: "Trainer", prepared: Prepared, step: int) -> Score | None:
    """Return the perplexity that was measured after `step` steps, or None."""
    assert trainer.eval_dataset is not None
    tokens = len(trainer.eval_dataset) * (prepared.config.length - 1)  # type: ignore[arg-type]
    losses = [
        entry["eval_loss"]
        for entry in trainer.state.log_history
        if entry["step"] == step and "eval_loss" in entry
    ]
    return Score(losses[-1], None, tokens) if losses else None
