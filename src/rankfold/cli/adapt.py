"""`rankfold adapt`: train an adapter on data."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.cli.settings import gathered, option, say
from rankfold.errors import InvalidOption
from rankfold.training.config import RunConfig

DATA, METHOD, TRAINING, OUTPUT = "Data", "Method", "Training", "Output"


def adapt(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Model folder or hub name.", show_default=False)] = None,
    data: Annotated[str | None, option("File, folder or hub NAME[:SPLIT]", DATA)] = None,
    eval_data: Annotated[str | None, option("Data of the metric (training examples)", DATA)] = None,
    task: Annotated[str | None, option("causal | classify (from model, columns)", DATA)] = None,
    text: Annotated[str | None, option("Column of the text (text)", DATA)] = None,
    label: Annotated[str | None, option("Column of the label (label)", DATA)] = None,
    max_length: Annotated[int | None, option("Tokens per example (512)", DATA)] = None,
    method: Annotated[str | None, option("Point, such as dora/pissa (lora)", METHOD)] = None,
    rank: Annotated[int | None, option("Rank of the change (the method's)", METHOD)] = None,
    targets: Annotated[list[str] | None, option("Preset, glob; repeatable (the method's)", METHOD)] = None,
    train: Annotated[list[str] | None, option("Module trained whole; repeatable", METHOD)] = None,
    set: Annotated[list[str] | None, option("axis.option=value; repeatable", METHOD)] = None,
    lr: Annotated[float | None, option("Peak learning rate (2e-4)", TRAINING)] = None,
    epochs: Annotated[float | None, option("Passes over the data (3)", TRAINING)] = None,
    steps: Annotated[int | None, option("Optimizer steps, instead of epochs", TRAINING)] = None,
    batch_size: Annotated[int | None, option("Examples per forward pass (8)", TRAINING)] = None,
    accumulate: Annotated[int | None, option("Forward passes per step (1)", TRAINING)] = None,
    seed: Annotated[int | None, option("Decides every random choice (0)", TRAINING)] = None,
    dtype: Annotated[str | None, option("float32 | bfloat16 | float16 (float32)", TRAINING)] = None,
    device: Annotated[str | None, option("auto | cpu | cuda (auto)", TRAINING)] = None,
    out: Annotated[str | None, option("Folder that receives the adapter", OUTPUT)] = None,
    save_steps: Annotated[int | None, option("Steps between checkpoints (a tenth)", OUTPUT)] = None,
    resume: Annotated[bool, option("Continue the run in --out", OUTPUT, "--resume")] = False,
    overwrite: Annotated[bool, option("Replace the run in --out", OUTPUT, "--overwrite")] = False,
    dry_run: Annotated[bool, option("Show modules and memory only", OUTPUT, "--dry-run")] = False,
    config: Annotated[Path | None, option("YAML or JSON with these keys; flags win", OUTPUT)] = None,
    as_json: Annotated[bool, option("One JSON object on standard output", OUTPUT, "--json")] = False,
) -> None:
    """Adapt MODEL to data and write the adapter to a folder.

    rankfold adapt gpt2 --data notes.txt --method lora --out notes
    """
    settings = _settings(context.params, config, Path(out) if resume and out else None)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; standard output is the result's
        result = _perform(settings, resume=resume, overwrite=overwrite, dry_run=dry_run)
    say(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


def _settings(given: dict[str, Any], config: Path | None, resumed: Path | None) -> RunConfig:
    settings = gathered(RunConfig, given, config, resumed)
    for name in ("model", "data"):
        if name not in settings:
            raise InvalidOption(f"no {name} is given: write rankfold adapt MODEL --data FILE --out FOLDER")
    return RunConfig(**settings)


def _perform(settings: RunConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> Any:
    from rankfold.training.run import plan_run, run

    if dry_run:
        return plan_run(settings)
    return run(settings, resume=resume, overwrite=overwrite, notify=lambda message: say(message, err=True))
