"""`rankfold squeeze`: write an adapter at a smaller rank."""

import json
from pathlib import Path
from typing import Annotated

import typer


def squeeze(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, file or hub name.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="Most terms a weight keeps.", show_default=False)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of the squares a weight keeps, 0..1.", show_default=False)
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Largest relative error of a weight.", show_default=False)
    ] = None,
    share: Annotated[str, typer.Option(help="uniform | error (--rank is an average)")] = "uniform",
    data: Annotated[
        str | None, typer.Option(help="Text: errors are those of outputs on it.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base (the adapter's own).", show_default=False)] = None,
    format: Annotated[str, typer.Option(help="peft | portable")] = "peft",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Cut ADAPTER to a smaller rank by the best approximation, and print every weight's error.

    rankfold squeeze notes --rank 4 --out notes-4
    """
    from rankfold.training.squeezed import squeeze_adapter

    report = squeeze_adapter(
        adapter,
        out,
        rank=rank,
        energy=energy,
        max_error=max_error,
        share=share,
        data=data,
        model=model,
        format=format,
        overwrite=overwrite,
    )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
