"""`rankfold methods`: the catalogue."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods import space


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A name, axis=name or arXiv id.", show_default=False)
    ] = None,
    axis: Annotated[
        str | None, typer.Option(help="structure, init, ranks, dynamics, ...", show_default=False)
    ] = None,
    compose: Annotated[
        bool, typer.Option("--compose", help="Which methods go together, and why the others do not.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """List the methods, or show one: formula, paper, options. Piped, the list has one line per method."""
    if axis is not None:
        _of_axis(rf.methods(), axis)
    if name is not None and axis is not None and "=" not in name:
        name = f"{axis}={name}"
    if compose:
        _compose(name, axis, as_json)
        return
    if name is not None:
        method = rf.find_method(name)
        typer.echo(_json(method.to_dict()) if as_json else _page(method))
        return
    found = _of_axis(rf.methods(), axis)
    if as_json:
        typer.echo(_json([method.to_dict() for method in found]))
    elif sys.stdout.isatty():
        Console().print(_table(found))
    else:  # for grep and cut
        typer.echo("\n".join("\t".join(_row(method)) for method in found))


def _compose(name: str | None, axis: str | None, as_json: bool) -> None:
    if name is None and axis is None and not as_json:
        typer.echo(space.table())
        return
    found = [v for v in space.pairs() if axis in (None, *map(space.axis_of, (v.first, v.second)))]
    if name is not None:
        wanted = rf.find_method(name)
        if space.axis_of(wanted) not in space.AXES:
            raise InvalidOption(f"{wanted.name} is a {wanted.axis} and no part that could be combined")
        found = [v for v in space.pairs() if wanted in (v.first, v.second)]
    if as_json:
        typer.echo(_json([verdict.to_dict() for verdict in found]))
    else:
        typer.echo("\n".join(f"{v.recipe.text()}: {v.reason or 'works'}" for v in found))


def _of_axis(found: list[Any], axis: str | None) -> list[Any]:
    axes = sorted({method.axis for method in found})
    if axis is not None and axis not in axes:
        raise InvalidOption(f"no method is on the axis {axis!r}; the axes are {', '.join(axes)}")
    return [method for method in found if axis in (None, method.axis)]


def _table(found: list[Any]) -> Table:
    table = Table(
        Column("method", no_wrap=True), "axis", "year", "formula", "title", box=None, pad_edge=False
    )
    for method in found:
        table.add_row(*map(escape, _row(method)))
    return table


def _row(method: Any) -> tuple[str, ...]:
    return method.name, method.axis, str(method.year), method.formula, method.title


def _page(method: Any) -> str:
    lines = {
        "axis": method.axis,
        "point": _point(method.build()) if method.axis == "recipe" else None,
        "formula": method.formula,
        "paper": f"{method.title} ({method.year})",
        "arxiv": f"https://arxiv.org/abs/{method.arxiv}" if method.arxiv else None,
        "code": f"https://github.com/{method.code}" if method.code else None,
        "status": method.status,
    }
    shown = [f"{name:<8} {value}" for name, value in lines.items() if value]
    options = [f"  {method.axis}.{option}={_value(value)}" for option, value in method.options.items()]
    return "\n".join(
        [method.name, *shown, *(["options for --set, with their defaults", *options] if options else [])]
    )


def _point(recipe: rf.Recipe) -> str:
    aim = [f"{key} {value}" for key in ("targets", "exclude", "rank") if (value := getattr(recipe, key))]
    return "; ".join([recipe.text(), *aim])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
