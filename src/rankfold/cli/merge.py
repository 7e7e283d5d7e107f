"""`rankfold merge`: several models, or several adapters, become one."""

import json
from pathlib import Path
from typing import Annotated

import typer


def merge(
    models: Annotated[
        list[str],
        typer.Argument(help="Folders of models or adapters, or one .yml of mergekit.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    method: Annotated[
        str | None, typer.Option(help="linear, ties, breadcrumbs, ...", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model from which all were trained.", show_default=False)
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="One for each model, in order.", show_default=False)
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="option=value of the method.", show_default=False)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the result (the base's).", show_default=False)] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of merged adapters (sum of ranks).", show_default=False)
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse adapters whose targets differ.")] = False,
    seed: Annotated[int, typer.Option(help="Of random choices.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Merge MODELS into one by a rule of merging (rankfold methods --axis merge).

    rankfold merge A B --method ties --base BASE --weight 0.3 --weight 0.7 --set density=0.2 --out AB
    """
    from rankfold.merging.request import merge_request

    report = merge_request(
        models, out=out, method=method, base=base, weights=weight, assignments=options or [], dtype=dtype,
        rank=rank, strict=strict, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
