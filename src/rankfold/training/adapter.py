"""From an adapter's folder back to an adapted model, and on to what others read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.training.base import Base, load_base, read_model_config, task_of
from rankfold.training.config import read_config
from rankfold.training.folder import appearing


def load_adapted(adapter: str, *, model: str | None = None) -> tuple[str, Base]:
    """Load the base that `adapter` was made for, with its run's task and classes, and the adapter onto it.

    Args:
        adapter: folder or hub name of an adapter; a folder written by `rankfold adapt` also tells the task.
        model: folder or hub name of the base, or None for the one that the adapter names.

    Returns:
        The base's name, and the base with the adapter on it.

    Raises:
        InvalidOption: when no base is named and the adapter names none.
        RankfoldError: when the adapter cannot be read or is for another base.
    """
    settings = _run_settings(Path(adapter))
    name = model or settings.get("model") or _named_base(Path(adapter))
    if name is None:
        raise InvalidOption(f"{adapter} does not say which model it adapts: name it with --model")
    labels: Sequence[str] | None = settings.get("labels")
    task = settings.get("task") or task_of(read_model_config(name)) or "causal"
    base = load_base(name, task, labels=labels)
    rf.load(base.model, adapter)
    return name, base


def fold_adapter(adapter: str, out: Path, *, model: str | None = None, overwrite: bool = False) -> str:
    """Multiply `adapter` into its base, write a stock checkpoint to `out`, and return the base's name.

    Raises:
        OutputExists: when `out` is not empty and may not be overwritten.
        RankfoldError: when the adapter cannot be loaded or has no dense form.
    """
    with appearing(out, overwrite=overwrite) as staging:
        name, base = load_adapted(adapter, model=model)
        rf.fold(base.model)
        base.model.save_pretrained(staging)
        base.tokenizer.save_pretrained(staging)
    return name


def export_adapter(
    adapter: str,
    out: Path,
    *,
    format: str = "peft",
    model: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    overwrite: bool = False,
) -> Any:
    """Write `adapter` to `out` in another form, by `rankfold.export`, and return its report.

    Raises:
        OutputExists: when `out` is not empty and may not be overwritten.
        RankfoldError: when the adapter cannot be loaded, or not be written in that form within `max_error`.
    """
    with appearing(out, overwrite=overwrite) as staging:
        _, base = load_adapted(adapter, model=model)
        return rf.export(base.model, staging, format=format, rank=rank, max_error=max_error)


def _run_settings(adapter: Path) -> dict[str, Any]:
    file = adapter / "config.yaml"
    return read_config(file) if file.is_file() else {}


def _named_base(adapter: Path) -> str | None:
    for name, key in (("rankfold.json", "base"), ("adapter_config.json", "base_model_name_or_path")):
        file = adapter / name
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8")).get(key) or None
    return None
