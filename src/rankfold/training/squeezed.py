"""From an adapter's folder or file to a smaller one."""

import contextlib
from pathlib import Path
from typing import Any

import rankfold as rf
from rankfold.errors import FormatError, Incompatible, InvalidOption
from rankfold.formats.changes import Changes, read_changes
from rankfold.formats.files import refuse_existing
from rankfold.methods.persist import locate
from rankfold.methods.squeezing import Choice, SqueezeReport
from rankfold.training.adapter import load_base_of
from rankfold.training.base import Base
from rankfold.training.calibration import calibration_batches


def squeeze_adapter(
    adapter: str,
    out: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    format: str = "peft",
    overwrite: bool = False,
    **choice: Any,
) -> SqueezeReport:
    """Write an adapter at a smaller rank, and return what that cost.

    Args:
        adapter: folder, file or hub name of an adapter.
        out: the folder to write, complete or not at all.
        model: folder or hub name of the base; None takes the one that the adapter names, where data or the
            adapter's form need it.
        data: text as `rankfold adapt` reads it, which weighs errors by the inputs that weights meet on the
            first 256 examples: with the adapter where it can be loaded onto the base, else without.
        format: "peft" or "portable".
        overwrite: replace a folder that is there.
        choice: `rank`, `energy`, `max_error` and `share`, as `rankfold.squeeze` takes them.

    Raises:
        OutputExists: when `out` is not empty and may not be overwritten.
        InvalidOption: when nothing says how small it shall be.
        RankfoldError: when the adapter, the base or the data cannot be read.
    """
    if not Choice(**choice).approximates:
        raise InvalidOption("say how small it shall be: --rank, --energy or --max-error")
    refuse_existing(out, overwrite=overwrite)  # before a large model is loaded
    path = Path(adapter) if Path(adapter).is_file() else locate(adapter)
    report = SqueezeReport()
    changes, base = _read(adapter, path, model, bool(data))
    weighing: dict[str, Any] = {}
    if data is not None and base is not None:
        weighing = {"base": base.model, "data": _input_statistics(base, path, changes, data)}
    rf.squeeze(changes, **choice, **weighing, out=out, format=format, overwrite=overwrite, report=report)
    return report


def _read(adapter: str, path: Path, model: str | None, with_base: bool) -> tuple[Changes, Base | None]:
    """Return an adapter's changes, and its base where that is asked for or changes or names depend on it."""
    if model is None and not with_base:
        with contextlib.suppress(Incompatible):
            changes = read_changes(path)
            if not changes.flattened:
                return changes, None
    _, base = load_base_of(path, adapter, model=model)
    return read_changes(path, model=base.model), base


def _input_statistics(base: Base, path: Path, changes: Changes, data: str) -> rf.Statistics:
    batches, loaded = calibration_batches(base, data), _load(base, path)
    try:
        return rf.collect(base.model, batches, "input_gram", targets=list(changes.paths))
    finally:
        if loaded:
            rf.remove(base.model)


def _load(base: Base, path: Path) -> bool:
    """Load an adapter onto its base, and say whether it is of a form that can be."""
    if not path.is_dir():
        return False
    try:
        rf.load(base.model, path)
    except (FormatError, Incompatible):
        return False
    return True
