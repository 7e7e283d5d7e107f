"""`rankfold fold`: multiply an adapter into its base."""

import json
from pathlib import Path
from typing import Annotated

import typer


def fold(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub name.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Base (the adapter's own).", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Multiply ADAPTER into its base and write a stock checkpoint with its tokenizer.

    rankfold fold notes --model gpt2 --out notes-folded
    """
    from rankfold.training.adapter import fold_adapter

    base = fold_adapter(adapter, out, model=model, overwrite=overwrite)
    files = sorted(file.name for file in out.iterdir())
    if as_json:
        typer.echo(json.dumps({"out": str(out), "base": base, "files": files}, indent=2))
    else:
        typer.echo(f"{base} with {adapter} folded in: {out}\nload it with from_pretrained({str(out)!r})")
