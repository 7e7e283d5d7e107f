"""`rankfold compress`: turn a model into a smaller one."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.cli.settings import gathered, option, say
from rankfold.errors import InvalidOption

METHOD, TEXT, OUTPUT = "Method", "Text", "Output"


def compress(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Model folder or hub name.", show_default=False)] = None,
    method: Annotated[str | None, option("svd, fwsvd, lord, ... (svd-llm)", METHOD)] = None,
    keep: Annotated[float | None, option("Share that remains (0.7)", METHOD)] = None,
    targets: Annotated[list[str] | None, option("Preset, glob (the method's)", METHOD)] = None,
    share: Annotated[str | None, option("uniform, error, ... (the method's)", METHOD)] = None,
    calibration: Annotated[str | None, option("parallel | sequential", METHOD)] = None,
    solver: Annotated[str | None, option("exact | randomised (exact)", METHOD)] = None,
    original: Annotated[str | None, option("Model before it was compressed", METHOD)] = None,
    set: Annotated[list[str] | None, option("damping=0.01; repeatable", METHOD)] = None,
    seed: Annotated[int | None, option("Of random choices (0)", METHOD)] = None,
    data: Annotated[str | None, option("Calibration: file, folder, hub name", TEXT)] = None,
    eval_data: Annotated[str | None, option("Unseen text (held out)", TEXT)] = None,
    held_out: Annotated[float | None, option("Share held out (0.1)", TEXT, hidden=True)] = None,
    text: Annotated[str | None, option("Column of the text (text)", TEXT)] = None,
    label: Annotated[str | None, option("Column of the label (label)", TEXT)] = None,
    tokens: Annotated[int | None, option("To calibrate on, at most", TEXT)] = None,
    samples: Annotated[int | None, option("Sequences, instead (256)", TEXT)] = None,
    eval_samples: Annotated[int | None, option("To measure on (128)", TEXT, hidden=True)] = None,
    length: Annotated[int | None, option("Tokens per sequence (512)", TEXT)] = None,
    batch_size: Annotated[int | None, option("Sequences per pass (8)", TEXT)] = None,
    few_tokens: Annotated[str | None, option("error | allow (error)", TEXT)] = None,
    memory: Annotated[float | None, option("GiB of statistics (one layer's)", TEXT)] = None,
    dtype: Annotated[str | None, option("auto | float32 | bfloat16 | float16", TEXT)] = None,
    device: Annotated[str | None, option("auto | cpu | cuda (auto)", TEXT)] = None,
    out: Annotated[str | None, option("Folder that receives the model", OUTPUT)] = None,
    form: Annotated[str | None, option("expression | layers | dense", OUTPUT)] = None,
    resume: Annotated[bool, option("Continue the run in --out", OUTPUT, "--resume")] = False,
    overwrite: Annotated[bool, option("Replace the run in --out", OUTPUT, "--overwrite")] = False,
    dry_run: Annotated[bool, option("Show the plan only", OUTPUT, "--dry-run")] = False,
    config: Annotated[Path | None, option("YAML or JSON, flags win", OUTPUT)] = None,
    as_json: Annotated[bool, option("JSON on standard output", OUTPUT, "--json")] = False,
) -> None:
    """Compress MODEL and write the smaller one to a folder.

    rankfold compress gpt2 --keep 0.7 --data notes.txt --out smaller
    """
    given = {**context.params, "set": [_with_axis(each) for each in set or []]}
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; standard output is the result's
        result = _perform(given, config, Path(out) if resume and out else None, resume, overwrite, dry_run)
    say(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


def _with_axis(assignment: str) -> str:
    """Let an option without an axis be the method's."""
    return assignment if "." in assignment.partition("=")[0] else f"compress.{assignment}"


def _perform(
    given: dict[str, Any], config: Path | None, resumed: Path | None, resume: bool, overwrite: bool, dry: bool
) -> Any:
    from rankfold.compression.config import CompressConfig
    from rankfold.compression.run import plan_compression, run_compression

    settings = gathered(CompressConfig, given, config, resumed)
    if "model" not in settings:
        raise InvalidOption("no model is given: write rankfold compress MODEL --data FILE --out FOLDER")
    asked = CompressConfig(**settings)
    if dry:
        return plan_compression(asked)
    return run_compression(
        asked, resume=resume, overwrite=overwrite, notify=lambda message: say(message, err=True)
    )
