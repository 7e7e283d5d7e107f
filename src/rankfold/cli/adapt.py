"""`rankfold adapt`: train an adapter on data."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.errors import InvalidOption
from rankfold.training.config import RunConfig, parse_options, read_config

DATA, METHOD, TRAINING, OUTPUT = "Data", "Method", "Training", "Output"


def _option(help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def adapt(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Model folder or hub name.", show_default=False)] = None,
    data: Annotated[str | None, _option("File, folder or hub NAME[:SPLIT]", DATA)] = None,
    eval_data: Annotated[str | None, _option("Data of the metric (training examples)", DATA)] = None,
    task: Annotated[str | None, _option("causal | classify (from model, columns)", DATA)] = None,
    text: Annotated[str | None, _option("Column of the text (text)", DATA)] = None,
    label: Annotated[str | None, _option("Column of the label (label)", DATA)] = None,
    max_length: Annotated[int | None, _option("Tokens per example (512)", DATA)] = None,
    method: Annotated[str | None, _option("Point, such as dora/pissa (lora)", METHOD)] = None,
    rank: Annotated[int | None, _option("Rank of the change (the method's)", METHOD)] = None,
    targets: Annotated[list[str] | None, _option("Preset, glob; repeatable (the method's)", METHOD)] = None,
    train: Annotated[list[str] | None, _option("Module trained whole; repeatable", METHOD)] = None,
    set: Annotated[list[str] | None, _option("axis.option=value; repeatable", METHOD)] = None,
    lr: Annotated[float | None, _option("Peak learning rate (2e-4)", TRAINING)] = None,
    epochs: Annotated[float | None, _option("Passes over the data (3)", TRAINING)] = None,
    steps: Annotated[int | None, _option("Optimizer steps, instead of epochs", TRAINING)] = None,
    batch_size: Annotated[int | None, _option("Examples per forward pass (8)", TRAINING)] = None,
    accumulate: Annotated[int | None, _option("Forward passes per step (1)", TRAINING)] = None,
    seed: Annotated[int | None, _option("Decides every random choice (0)", TRAINING)] = None,
    dtype: Annotated[str | None, _option("float32 | bfloat16 | float16 (float32)", TRAINING)] = None,
    device: Annotated[str | None, _option("auto | cpu | cuda (auto)", TRAINING)] = None,
    out: Annotated[str | None, _option("Folder that receives the adapter", OUTPUT)] = None,
    save_steps: Annotated[int | None, _option("Steps between checkpoints (a tenth)", OUTPUT)] = None,
    resume: Annotated[bool, _option("Continue the run in --out", OUTPUT, "--resume")] = False,
    overwrite: Annotated[bool, _option("Replace the run in --out", OUTPUT, "--overwrite")] = False,
    dry_run: Annotated[bool, _option("Show modules and memory only", OUTPUT, "--dry-run")] = False,
    config: Annotated[Path | None, _option("YAML or JSON with these keys; flags win", OUTPUT)] = None,
    as_json: Annotated[bool, _option("One JSON object on standard output", OUTPUT, "--json")] = False,
) -> None:
    """Adapt MODEL to data and write the adapter to a folder.

    rankfold adapt gpt2 --data notes.txt --method lora --out notes
    """
    settings = _settings(context.params, config, Path(out) if resume and out else None)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; standard output is the result's
        result = _perform(settings, resume=resume, overwrite=overwrite, dry_run=dry_run)
    _say(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


def _settings(given: dict[str, Any], config: Path | None, resumed: Path | None) -> RunConfig:
    """Combine the flags with the config file, or with the settings of the run that is resumed."""
    names = [item.name for item in dataclasses.fields(RunConfig)]
    flags = {name: given[name] for name in names if given.get(name) not in (None, [], ())}
    for name in ("targets", "train"):
        if name in flags:
            flags[name] = tuple(flags[name])
    stored = resumed / "config.yaml" if resumed else None
    file = config or (stored if stored and stored.is_file() and "model" not in flags else None)
    settings = read_config(file) if file else {}
    settings.update(flags, set={**settings.get("set", {}), **parse_options(flags.get("set", []))})
    for name in ("model", "data"):
        if name not in settings:
            raise InvalidOption(f"no {name} is given: write rankfold adapt MODEL --data FILE --out FOLDER")
    return RunConfig(**settings)


def _perform(settings: RunConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> Any:
    from rankfold.training.run import plan_run, run

    if dry_run:
        return plan_run(settings)
    return run(settings, resume=resume, overwrite=overwrite, notify=lambda message: _say(message, err=True))


def _say(message: str, *, err: bool = False) -> None:
    """Print, unless this is one of several processes and not the first."""
    from rankfold.training.run import is_main_process

    if is_main_process():
        typer.echo(message, err=err)
