"""The folder of a run: what is in it, who may write there, and how it becomes complete."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rankfold.errors import InvalidOption, OutputExists
from rankfold.formats.native import RECORD, TENSORS
from rankfold.training.config import RunConfig, config_text, flag, read_config
from rankfold.training.whole import NotWritten, step_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Where a run continues and how often it saves may change between its parts; nothing else may.
MAY_CHANGE = {"out", "save_steps", "device"}


@dataclass(frozen=True)
class RunFolder:
    """A folder with `config.yaml`, `checkpoints/`, and at the end what was trained and `result.json`.

    Args:
        path: the folder; it need not exist yet.
        kind: the dataclass of the settings.
        record: the file by which others know that what was trained is there; it is written last.
        results: further files and folders that the end of a run leaves, as globs.
    """

    path: Path
    kind: "type[DataclassInstance]" = RunConfig
    record: str = RECORD
    results: tuple[str, ...] = (TENSORS, "README.md")

    @property
    def config_file(self) -> Path:
        """The settings that repeat the run."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of the trainer's checkpoints."""
        return self.path / "checkpoints"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse to write here, unless the folder is empty, may be overwritten, or holds a run to resume.

        Raises:
            OutputExists: when it holds something else.
            InvalidOption: when both `resume` and `overwrite` are asked for.
        """
        if resume and overwrite:
            raise InvalidOption("resume keeps what the folder holds and overwrite discards it; choose one")
        if self.path.exists() and not self.path.is_dir():
            raise OutputExists(f"{self.path} exists and is no folder; choose another --out")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if overwrite:
            self._require_run()
        elif not resume:
            raise OutputExists(f"the folder {self.path} is not empty; choose another or add --overwrite")
        elif not self.config_file.is_file():
            raise OutputExists(f"the folder {self.path} holds no run to resume: it has no config.yaml")

    def start(self, config: "DataclassInstance", *, overwrite: bool) -> None:
        """Clear what an overwritten run left, and write the settings.

        Raises:
            InvalidOption: when a run that is resumed had other settings.
        """
        if overwrite:
            self._clear()
        if self.config_file.is_file():
            self._compare(config)
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, config_text(config))

    def last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that was written to its end: the trainer's state is its last file."""
        steps = {path: step_of(path) for path in self.checkpoints.glob("checkpoint-*")}
        found = sorted((step, path) for path, step in steps.items() if step is not None)
        return next((path for _, path in reversed(found) if _is_json(path / "trainer_state.json")), None)

    def finish(self, save: Callable[[Path], object], result: dict[str, Any]) -> None:
        """Let `save` write what was trained into an empty folder; move its files here, with the result.

        The record moves last: a folder that has it has the rest.

        Raises:
            NotWritten: the library that writes tensors could not; nothing has changed.
        """
        with tempfile.TemporaryDirectory(dir=self.path, prefix=".saving-") as temporary:
            staging = Path(temporary) / "trained"
            try:
                save(staging)
            except SafetensorError as error:  # which is no OSError where the disk is full
                raise NotWritten(
                    f"what was trained could not be written to {self.path}: {error}; --resume writes it "
                    "from the last checkpoint"
                ) from error
            write_text(staging / "result.json", json.dumps(result, indent=2) + "\n")
            for file in sorted(staging.iterdir(), key=lambda file: file.name == self.record):
                if file.is_dir():  # which takes the place of no other
                    _remove(self.path / file.name)
                file.replace(self.path / file.name)

    def _require_run(self) -> None:
        """Refuse to clear a folder that no run began, whose files are somebody's."""
        if not self.config_file.is_file() and not self.checkpoints.is_dir():
            raise OutputExists(
                f"the folder {self.path} holds other files and no run to overwrite; choose another --out"
            )

    def _clear(self) -> None:
        for pattern in (self.record, *self.results, "result.json", "config.yaml", "checkpoints/checkpoint-*"):
            for path in self.path.glob(pattern):
                _remove(path)

    def _compare(self, config: "DataclassInstance") -> None:
        stored = self.kind(**read_config(self.config_file, self.kind))
        for item in dataclasses.fields(self.kind):
            before, now = getattr(stored, item.name), getattr(config, item.name)
            if item.name not in MAY_CHANGE and before != now:
                raise InvalidOption(
                    f"{flag(item.name)} was {before!r} in {self.config_file} and is {now!r} now; "
                    f"a resumed run keeps its settings"
                )


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
