"""`rankfold pretrain`: train a language model from scratch."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.cli.settings import gathered, option, say
from rankfold.errors import InvalidOption

TEXT, TRAINING, OUTPUT = "Text and weights", "Training", "Output"


def pretrain(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="0.1M to 7B, or a config.", show_default=False)] = None,
    data: Annotated[list[str] | None, option("Files, folders, globs (Python's own)", TEXT)] = None,
    eval_data: Annotated[list[str] | None, option("Text of the perplexity (held out)", TEXT)] = None,
    held_out: Annotated[float | None, option("Share that is held out (0.05)", TEXT, hidden=True)] = None,
    tokenizer: Annotated[str | None, option("Folder, file, hub name (trained)", TEXT)] = None,
    vocab: Annotated[int | None, option("Tokens of the trained one (model's)", TEXT)] = None,
    length: Annotated[int | None, option("Tokens per sequence (256)", TEXT)] = None,
    optimizer: Annotated[str | None, option("adamw, galore, fira, ... (adamw)", TEXT)] = None,
    structure: Annotated[str | None, option("sltrain, lora/relora, ... (dense)", TEXT)] = None,
    rank: Annotated[int | None, option("Of the structure (width / 4)", TEXT)] = None,
    targets: Annotated[list[str] | None, option("Preset, glob (all-linear)", TEXT)] = None,
    set: Annotated[list[str] | None, option("optimizer.rank=64; repeatable", TEXT)] = None,
    lr: Annotated[float | None, option("Peak rate (the optimizer's)", TRAINING)] = None,
    epochs: Annotated[float | None, option("Passes over the text (1)", TRAINING)] = None,
    steps: Annotated[int | None, option("Optimizer steps, instead", TRAINING)] = None,
    batch_size: Annotated[int | None, option("Sequences per forward pass (16)", TRAINING)] = None,
    accumulate: Annotated[int | None, option("Forward passes per step (1)", TRAINING)] = None,
    warmup: Annotated[float | None, option("Share of the steps (0.1)", TRAINING)] = None,
    floor: Annotated[float | None, option("Rate at the end (0.1 of lr)", TRAINING, hidden=True)] = None,
    clip: Annotated[float | None, option("Gradient norm, 0: any (1)", TRAINING, hidden=True)] = None,
    seed: Annotated[int | None, option("Decides every random choice (0)", TRAINING)] = None,
    dtype: Annotated[str | None, option("float32 | bfloat16 | mixed (float32)", TRAINING)] = None,
    compile: Annotated[bool, option("Compile the model", TRAINING, "--compile")] = False,
    checkpointing: Annotated[bool, option("Recompute blocks", TRAINING, "--checkpointing")] = False,
    step_in_backward: Annotated[
        bool, option("One gradient at a time", TRAINING, "--step-in-backward", hidden=True)
    ] = False,
    fsdp: Annotated[bool, option("Shard over torchrun's processes", TRAINING, "--fsdp")] = False,
    device: Annotated[str | None, option("auto | cpu | cuda (auto)", TRAINING)] = None,
    out: Annotated[str | None, option("Folder that receives the model", OUTPUT)] = None,
    save_steps: Annotated[int | None, option("Between checkpoints (a tenth)", OUTPUT)] = None,
    eval_steps: Annotated[int | None, option("Between perplexities (a tenth)", OUTPUT, hidden=True)] = None,
    eval_blocks: Annotated[int | None, option("Sequences of each (128)", OUTPUT, hidden=True)] = None,
    resume: Annotated[bool, option("Continue the run in --out", OUTPUT, "--resume")] = False,
    overwrite: Annotated[bool, option("Replace the run in --out", OUTPUT, "--overwrite")] = False,
    dry_run: Annotated[bool, option("Show the plan only", OUTPUT, "--dry-run")] = False,
    config: Annotated[Path | None, option("YAML or JSON, flags win", OUTPUT)] = None,
    as_json: Annotated[bool, option("JSON on standard output", OUTPUT, "--json")] = False,
) -> None:
    """Train a language model from scratch and write it to a folder (more flags: the guide).

    rankfold pretrain 1M --optimizer galore --out run
    """
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; standard output is the result's
        result = _perform(
            context.params, config, Path(out) if resume and out else None, resume, overwrite, dry_run
        )
    say(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


def _perform(
    given: dict[str, Any], config: Path | None, resumed: Path | None, resume: bool, overwrite: bool, dry: bool
) -> Any:
    from rankfold import pretrain as job

    settings = gathered(job.PretrainConfig, given, config, resumed)
    if "model" not in settings:
        raise InvalidOption("no model is given: write rankfold pretrain 1M --out FOLDER")
    asked = job.PretrainConfig(**settings)
    if dry:
        return job.plan_pretraining(asked)
    return job.pretrain(asked, resume=resume, overwrite=overwrite, notify=lambda text: say(text, err=True))
