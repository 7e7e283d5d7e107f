"""One compression from the command line: from settings to a smaller model in a folder, and what that cost."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.compression.config import CompressConfig
from rankfold.compression.evaluate import compared, measured, said
from rankfold.compression.forms import MODULE, automatic_classes, save_dense, save_layers
from rankfold.compression.job import compress
from rankfold.compression.picture import draw_spectra
from rankfold.compression.prepare import Prepared, load_model, prepare
from rankfold.compression.report import CompressionReport
from rankfold.errors import InvalidOption, RankfoldError
from rankfold.formats.files import write_json
from rankfold.layers import adaptation_of, count
from rankfold.training.base import silence
from rankfold.training.config import json_settings
from rankfold.training.finished import BASE, RECORD, STRUCTURE, save_finished
from rankfold.training.folder import RunFolder
from rankfold.training.loop import Notify

LAYERS = "checkpoint-layers"  # of the weights that are solved already
TEXT, RESULT, REPORT, PICTURE = "text.json", "result.json", "report.json", "spectra.png"
WORDS = ("vocab.txt", "merges.txt", "*.model")  # of tokenizers
RESULTS = ("*.safetensors", "*.json", "*.jinja", f"{MODULE}.py", *WORDS, PICTURE, BASE, STRUCTURE)


@dataclass(frozen=True)
class CompressionPlan:
    """What a compression would do, found before it does anything.

    Attributes:
        config: the settings.
        weights: how many are targeted.
        targeted: numbers in them.
        budget: how many of these may remain.
        parameters: of the model.
        dtype: of the model, and of the result.
        facts: of the text: sequences and tokens that are used, held out and wanted.
        fresh: modules of the model that are in no checkpoint.
    """

    config: CompressConfig
    weights: int
    targeted: int
    budget: int
    parameters: int
    dtype: str
    facts: Mapping[str, Any]
    fresh: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-like data."""
        return {
            "weights": self.weights,
            "targeted_parameters": self.targeted,
            "budget": self.budget,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "text": dict(self.facts),
            "config": json_settings(self.config),
        }

    def __str__(self) -> str:
        """Return the plan for a person."""
        facts, config = self.facts, self.config
        wants = f"; the widest weight wants {facts['wanted_tokens']:,}" if facts["wanted_tokens"] else ""
        lines = {
            "model": f"{config.model}: {self.parameters:,} parameters in {self.dtype}",
            "weights": f"{self.weights} with {self.targeted:,} numbers, of which {self.budget:,} may remain",
            "text": f"{facts['tokens']:,} of {facts['available_tokens']:,} tokens in {facts['sequences']:,} "
            f"sequences to calibrate on{wants}",
            "unseen": f"{facts['unseen_tokens']:,} tokens in {facts['unseen_sequences']:,} sequences",
            "fresh": f"{', '.join(self.fresh)}: in no checkpoint, at random" if self.fresh else "",
            "method": f"{config.method}, {config.calibration or 'its own'} calibration, form {config.form}",
        }
        return "\n".join(f"{name:<10} {line}" for name, line in lines.items() if line)


@dataclass(frozen=True)
class CompressionResult:
    """What a compression did.

    Attributes:
        facts: as JSON-like data, as `result.json` holds them.
        text: for a person.
    """

    facts: Mapping[str, Any]
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-like data: seconds, numbers, nats."""
        return dict(self.facts)

    def __str__(self) -> str:
        """Return the result for a person."""
        return self.text


def plan_compression(config: CompressConfig) -> CompressionPlan:
    """Find what `config` would compress and on how much text; nothing is written.

    Raises:
        RankfoldError: when the settings, the text or the model do not allow it.
    """
    return _plan(prepare(config))


def run_compression(
    config: CompressConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    notify: Notify = lambda message: None,
) -> CompressionResult:
    """Compress a model and leave it, its settings, a report and a picture in `config.out`.

    Args:
        config: what to do.
        resume: go on with the compression that `config.out` holds, at the weight where it was stopped.
        overwrite: replace the compression that `config.out` holds.
        progress: show a progress bar on the standard error stream.
        notify: is told in a sentence or a table what happens.

    Raises:
        RankfoldError: when the settings, the text, the model or the folder do not allow it.

    Example:
        >>> run_compression(CompressConfig("model", "smaller", keep=0.7, data="notes.txt"))  # doctest: +SKIP
    """
    if config.out is None:
        raise InvalidOption("a compression needs a folder for its model: name one with --out")
    folder = RunFolder(Path(config.out), CompressConfig, RECORD, RESULTS)
    folder.check(resume=resume, overwrite=overwrite)
    if resume and (folder.path / RESULT).is_file():
        folder.start(config, overwrite=False)
        notify("the compression was finished already")
        return _read(folder)
    prepared = prepare(config)
    plan = _plan(prepared)
    folder.start(config, overwrite=overwrite)
    _same_text(folder.path / TEXT, plan.facts)
    notify(str(plan))
    try:
        report, facts = _compressed(prepared, plan, folder, progress)
    except RankfoldError:
        if not resume:
            _withdraw(folder)
        raise
    result = _leave(folder, prepared, plan, report, facts, notify)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return result


def _withdraw(folder: RunFolder) -> None:
    """Leave nothing of a compression that was refused before any weight was solved."""
    if any(folder.checkpoints.rglob("*.safetensors")):
        return
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    for file in (folder.config_file, folder.path / TEXT):
        file.unlink(missing_ok=True)
    if not any(folder.path.iterdir()):
        folder.path.rmdir()


def _plan(prepared: Prepared) -> CompressionPlan:
    config, model = prepared.config, prepared.model
    targeted = sum(out * columns for out, columns in prepared.weights.values())
    keep = 0.7 if config.keep is None else config.keep
    return CompressionPlan(
        config,
        len(prepared.weights),
        targeted,
        int(keep * targeted) if prepared.method.traits["shrinks"] else targeted,
        count(model).stored,
        str(model.dtype).removeprefix("torch."),
        prepared.facts,
        prepared.fresh,
    )


def _compressed(
    prepared: Prepared, plan: CompressionPlan, folder: RunFolder, progress: bool
) -> tuple[CompressionReport, dict[str, Any]]:
    """Measure, compress in place, and measure again."""
    config, method, reports = prepared.config, prepared.method, list[CompressionReport]()
    with silence():
        before = measured(prepared)
        compress(
            prepared.model,
            config.method,
            keep=config.keep,
            data=prepared.batches() or None,
            targets=list(config.targets) or None,
            share=_share(prepared),
            calibration=config.calibration,
            solver=config.solver,
            original=None if config.original is None else load_model(config.original, config.dtype)[0],
            few_tokens=config.few_tokens,
            memory=prepared.memory,
            seed=config.seed,
            progress=progress,
            folder=None if method.traits["whole"] else folder.checkpoints / LAYERS,
            report=reports.append,
            **config.options("compress"),
        )
        after = measured(prepared)
    [report] = reports
    predicted = plan.parameters - sum(row.dense for row in report.rows) + sum(row.kept for row in report.rows)
    return report, compared(before, after, predicted)


def _share(prepared: Prepared) -> tuple[str, dict[str, Any]] | None:
    """Return the rule that shares parameters out, with its options, or None for the method's own."""
    name, options = prepared.config.share, prepared.config.options("share")
    if name is None and not options:
        return None
    return name or prepared.method.traits["share"], options


def _leave(
    folder: RunFolder,
    prepared: Prepared,
    plan: CompressionPlan,
    report: CompressionReport,
    facts: dict[str, Any],
    notify: Notify,
) -> CompressionResult:
    """Write the model, the report and the picture, all at once."""
    form = _form(prepared)
    text = "\n".join([str(report), said(facts), f"{'load':<11} {loading(form, folder.path, prepared.model)}"])
    result = {
        **{key: value for key, value in report.to_dict().items() if key != "rows"},
        **facts,
        **plan.to_dict(),
        "out": str(folder.path),
        "form": form,
        "loads_with": loading(form, folder.path, prepared.model),
        "text_report": text,
    }
    drawn = importlib.util.find_spec("matplotlib") is not None

    def save(path: Path) -> None:
        _save(prepared, path, report)
        write_json(path / REPORT, {**report.to_dict(), **facts})
        if drawn:
            title = f"{Path(prepared.config.model).name}, {report.method}, {100 * report.kept:.0f} % remain"
            draw_spectra(report.rows, title, path / PICTURE)

    with silence():
        folder.finish(save, result)
    if not drawn:
        notify("no picture of the spectra was drawn: pip install 'rankfold[plots]'")
    return CompressionResult(result, text)


def _save(prepared: Prepared, path: Path, report: CompressionReport) -> None:
    """Write the model in the form that was asked for."""
    path.mkdir()
    form = _form(prepared)
    if form == "expression":
        facts = {"model": prepared.config.model, "method": report.method, "remains": f"{report.kept:.3f}"}
        save_finished(prepared.model, prepared.tokenizer, path, facts)
        return
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(path)
    (save_layers if form == "layers" else save_dense)(prepared.model, path)


def _form(prepared: Prepared) -> str:
    """Return the form of the model: where no weight became a product, stock layers are dense ones."""
    form = prepared.config.form
    return "dense" if form == "layers" and adaptation_of(prepared.model) is None else form


def loading(form: str, path: Path, model: Any) -> str:
    """Return Python that loads what a compression left.

    Args:
        form: of the model.
        path: of the folder.
        model: that was written.
    """
    if form == "expression":
        return f"rankfold.training.finished.load_finished({str(path)!r})"
    if form == "dense":
        return f"transformers.{type(model).__name__}.from_pretrained({str(path)!r})"
    [name, *_] = automatic_classes(type(model))
    return f"transformers.{name}.from_pretrained({str(path)!r}, trust_remote_code=True)"


def _read(folder: RunFolder) -> CompressionResult:
    """Return what a finished compression had found."""
    facts = json.loads((folder.path / RESULT).read_text(encoding="utf-8"))
    return CompressionResult(facts, facts["text_report"])


def _same_text(file: Path, facts: Mapping[str, Any]) -> None:
    """Write what the text is, or refuse another one than the compression began with."""
    if not file.is_file():
        write_json(file, facts)
    elif json.loads(file.read_text(encoding="utf-8"))["sha256"] != facts["sha256"]:
        raise InvalidOption(
            f"the text is not the one that the compression in {file.parent} began with; one that is resumed "
            "keeps its text"
        )
