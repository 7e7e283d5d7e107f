"""A merge as it is asked for in words: folders and options, or a mergekit file."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidOption
from .job import merge
from .mergekit import read_mergekit
from .report import MergeReport


def merge_request(
    models: Sequence[str],
    *,
    out: Path,
    method: str | None = None,
    base: str | None = None,
    weights: Sequence[float] | None = None,
    assignments: Sequence[str] = (),
    dtype: str | None = None,
    **settings: Any,
) -> MergeReport:
    """Merge folders, or what a mergekit file says, into a folder.

    Args:
        models: folders of models or of adapters, or one file of mergekit, *.yml or *.yaml.
        out: the folder to write.
        method: name of the rule; a file says it itself.
        base: folder of the model from which all were trained.
        weights: one for each model; none gives 1 to each.
        assignments: texts `option=value` of the method's options; values are JSON, or texts.
        dtype: of the result.
        settings: further arguments of `merge`.

    Raises:
        InvalidOption: there is neither a method nor a file, or a file and what it says itself.
        RankfoldError: as `merge` and `read_mergekit`.
    """
    asked = {"method": method, "base": base, "weights": list(weights) if weights else None, "dtype": dtype}
    options = dict(_option(text) for text in assignments)
    taken = next((name for name in options if name in inspect.signature(merge).parameters), None)
    if taken is not None:
        raise InvalidOption(f"--set {taken}: that is no option of a method but --{taken}")
    files = [name for name in models if Path(name).suffix in (".yml", ".yaml")]
    if files:
        _refuse_beside_file(models, asked, options)
        arguments = read_mergekit(files[0]).arguments()
    else:
        if method is None:
            raise InvalidOption(
                "--method names the rule of merging; rankfold methods --axis merge lists them"
            )
        arguments = {"models": list(models), **asked, **options}
    found: list[MergeReport] = []
    merge(out=out, report=found.append, **arguments, **settings)
    return found[0]


def _refuse_beside_file(models: Sequence[str], asked: dict[str, Any], options: dict[str, Any]) -> None:
    said = [name for name, value in asked.items() if value is not None] + (["set"] if options else [])
    if len(models) > 1:
        raise InvalidOption("a mergekit file names the models itself; pass it alone")
    if said:
        raise InvalidOption(f"a mergekit file says everything itself; leave --{said[0].rstrip('s')} away")


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidOption(f"--set {text}: write option=value, such as density=0.2")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()
