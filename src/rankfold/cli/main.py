"""The `rankfold` command: its verbs, and how errors become one sentence and an exit code."""

import inspect
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

import rankfold as rf
from rankfold.cli.adapt import adapt
from rankfold.cli.compress import compress
from rankfold.cli.export import export
from rankfold.cli.fold import fold
from rankfold.cli.merge import merge
from rankfold.cli.methods import methods
from rankfold.cli.pretrain import pretrain
from rankfold.cli.squeeze import squeeze
from rankfold.errors import RankfoldError

BAD_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    name="rankfold",
    help="Low-rank learning: pretrain, adapt, and turn the result into what others read.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (adapt, pretrain, compress, methods, export, fold, squeeze, merge):
    app.command()(verb)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Low-rank learning: pretrain, adapt, and turn the result into what others read."""
    if show_version:
        typer.echo(rf.__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 on bad input, 130 when interrupted.

    Args:
        arguments: words after the program's name; None takes them from the process.
    """
    _quieten()
    try:
        given = None if arguments is None else list(arguments)
        code = app(given, prog_name="rankfold", standalone_mode=False)
    except (RankfoldError, OSError) as error:
        return _fail(str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        return _fail(f"this needs {error.name}: pip install 'rankfold[cli,transformers]'", BAD_INPUT)
    except TyperException as error:
        return _fail(error.format_message(), BAD_INPUT)
    if code == INTERRUPTED:
        return _fail(_interrupted(sys.argv[1:] if given is None else given), INTERRUPTED)
    return code or 0


def _interrupted(words: Sequence[str]) -> str:
    """Say how it goes on: verbs that keep what they did have --resume, others leave nothing behind."""
    verbs = [command.callback for command in app.registered_commands if command.callback]
    resumes = {verb.__name__ for verb in verbs if "resume" in inspect.signature(verb).parameters}
    goes_on = bool(words) and words[0] in resumes
    return f"interrupted; {'the same command continues with --resume' if goes_on else 'nothing was written'}"


def _fail(message: str, code: int) -> int:
    typer.echo(f"rankfold: {' '.join(message.split())}", err=True)
    return code


def _quieten() -> None:
    """Silence remarks of libraries on what they lack; show warnings as plain sentences."""
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    hub = "huggingface_hub.utils._http"  # tells of every attempt to reach it; the error says it once
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree", "datasets.packaged_modules", hub):
        logging.getLogger(name).setLevel(logging.CRITICAL)
