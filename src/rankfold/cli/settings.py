"""Settings of a run from flags, a config file, or the run that is resumed; and what a run says."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rankfold.training.config import parse_options, read_config

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def option(help: str, panel: str, *names: str, hidden: bool = False) -> Any:
    """Return a flag without a default of its own: what is not given is the settings' to say."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, hidden=hidden)


def gathered(
    kind: "type[DataclassInstance]", given: Mapping[str, Any], config: Path | None, resumed: Path | None
) -> dict[str, Any]:
    """Combine the flags with the config file, or with the settings of the run that is resumed.

    Args:
        kind: the dataclass of the settings; `model` is one of them.
        given: the flags by name; None and empty ones are not given.
        config: a file of settings, which flags win over.
        resumed: the folder of a run that goes on.

    Raises:
        RankfoldError: when a file cannot be read, or an option be meant.
    """
    names = [item.name for item in dataclasses.fields(kind)]
    flags = {name: given[name] for name in names if given.get(name) not in (None, [], ())}
    flags = {name: value for name, value in flags.items() if value is not False}
    for name, value in flags.items():
        if isinstance(value, list) and name != "set":
            flags[name] = tuple(value)
    stored = resumed / "config.yaml" if resumed else None
    file = config or (stored if stored and stored.is_file() and "model" not in flags else None)
    settings = read_config(file, kind) if file else {}
    options = {**settings.get("set", {}), **parse_options(flags.pop("set", []))}
    settings.update(flags, set=options)
    return settings


def say(message: str, *, err: bool = False) -> None:
    """Print, unless this is one of several processes and not the first."""
    from rankfold.training.loop import is_main_process

    if is_main_process():
        typer.echo(message, err=err)
