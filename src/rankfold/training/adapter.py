"""From an adapter's folder back to an adapted model, and on to what others read."""

from pathlib import Path
from typing import Any

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.formats.export import check_options
from rankfold.formats.files import complete_folder, read_json, refuse_existing
from rankfold.methods.persist import locate
from rankfold.training.base import Base, load_base, read_model_config, task_of, task_of_class
from rankfold.training.calibration import calibration_batches
from rankfold.training.config import read_config


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
    folder = locate(adapter)
    name, base = load_base_of(folder, adapter, model=model)
    rf.load(base.model, folder)
    return name, base


def load_base_of(folder: Path, adapter: str, *, model: str | None = None) -> tuple[str, Base]:
    """Load the base that an adapter was made for, with its run's task and classes, without the adapter.

    Args:
        folder: where the adapter is; of a lone file, its name.
        adapter: what the adapter is called in messages.
        model: as `load_adapted` takes it.

    Raises:
        InvalidOption: when no base is named and the adapter names none.
        RankfoldError: when the base cannot be loaded.
    """
    settings = read_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    recorded = _recorded_base(folder)
    name = model or settings.get("model") or recorded["name"]
    if not name:
        raise InvalidOption(f"{adapter} does not say which model it adapts: name it with --model")
    task = settings.get("task") or task_of_class(recorded["class"]) or task_of(read_model_config(name))
    return name, load_base(name, task or "causal", labels=settings.get("labels"))


def fold_adapter(adapter: str, out: Path, *, model: str | None = None, overwrite: bool = False) -> str:
    """Multiply `adapter` into its base, write a stock checkpoint to `out`, and return the base's name.

    Raises:
        OutputExists: when `out` is not empty and may not be overwritten.
        RankfoldError: when the adapter cannot be loaded or has no dense form.
    """
    with complete_folder(out, overwrite=overwrite) as folder:
        name, base = load_adapted(adapter, model=model)
        rf.fold(base.model)
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return name


def export_adapter(
    adapter: str,
    out: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> rf.Report:
    """Write `adapter` to `out` in another form, and return the report.

    Args:
        adapter: folder or hub name of an adapter.
        out: the folder to write; of format "gguf" also a file that ends in .gguf.
        model: folder or hub name of the base, or None for the one that the adapter names.
        data: text as `rankfold adapt` reads it; its first 256 examples weigh an approximation.
        overwrite: replace what is there.
        options: `format`, `rank`, `max_error`, `native`, `dtype` and `drop_whole`, as `rankfold.export` takes
            them.

    Raises:
        OutputExists: when `out` is not empty and may not be overwritten.
        RankfoldError: when the adapter cannot be loaded, or not be written in that form.
    """
    wanted = (options.get("format", "peft"), options.get("rank"), options.get("max_error"))
    check_options(*wanted, data=data is not None, dtype=options.get("dtype", "f32"))
    if wanted[0] != "gguf" or out.suffix != ".gguf":
        refuse_existing(out, overwrite=overwrite)  # before a large model is loaded
    _, base = load_adapted(adapter, model=model)
    batches = None if data is None else calibration_batches(base, data)
    return rf.export(base.model, out, overwrite=overwrite, data=batches, **options)


def _recorded_base(folder: Path) -> dict[str, str]:
    """Return the name and the class of the base as a native or a peft folder records them."""
    if (folder / "rankfold.json").is_file():
        base = read_json(folder / "rankfold.json").get("base", {})
        return {"name": str(base.get("name") or ""), "class": str(base.get("class") or "")}
    peft = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else {}
    classifies = peft.get("task_type") == "SEQ_CLS" or _trains_head(peft.get("modules_to_save"))
    task = "ForSequenceClassification" if classifies else ""
    return {"name": str(peft.get("base_model_name_or_path") or ""), "class": task}


def _trains_head(modules: Any) -> bool:
    """Say whether one of the modules trained whole is the head that transformers gives a classifier."""
    return isinstance(modules, list) and not {"classifier", "score"}.isdisjoint(map(str, modules))
