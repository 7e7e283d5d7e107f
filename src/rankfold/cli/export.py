"""`rankfold export`: write an adapter in a form that others read."""

import json
from pathlib import Path
from typing import Annotated

import typer


def export(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub name.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write, or a .gguf file.", show_default=False)],
    format: Annotated[str, typer.Option(help="peft | portable | gguf | dense")] = "peft",
    model: Annotated[str | None, typer.Option(help="Base (the adapter's own).", show_default=False)] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of what is not low-rank.", show_default=False)
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Largest relative error allowed per weight.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text that weighs approximations.", show_default=False)
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="LoRA whatever the method (peft).")] = False,
    dtype: Annotated[str, typer.Option(help="f32 | f16 (gguf)")] = "f32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    drop_whole: Annotated[
        bool, typer.Option("--drop-whole", help="Leave out modules trained whole.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write ADAPTER as peft, plain LoRA for servers, GGUF for llama.cpp, or dense weights.

    rankfold export notes --format gguf --out notes.gguf
    """
    from rankfold.training.adapter import export_adapter

    report = export_adapter(
        adapter,
        out,
        format=format,
        model=model,
        rank=rank,
        max_error=max_error,
        data=data,
        native=not plain,
        dtype=dtype,
        overwrite=overwrite,
        drop_whole=drop_whole,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        typer.echo(str(report))
