"""Reading data: local files, folders of text and datasets of the hub, all as one table with named columns."""

import csv
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.errors import MissingPath, RankfoldError

if TYPE_CHECKING:
    from datasets import Dataset


class DataError(RankfoldError, ValueError):
    """Data is empty, unreadable, or lacks a column that the task needs."""


@dataclass(frozen=True)
class Table:
    """Rows with named columns, and where they came from.

    Args:
        name: the source, for messages.
        rows: a `datasets.Dataset`.
        prose: the rows are whole documents, to be joined and cut into pieces of equal length.
    """

    name: str
    rows: "Dataset"
    prose: bool = False

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.rows.column_names)

    def require(self, column: str, flag: str) -> None:
        """Raise a `DataError` that lists the columns when `column` is missing; `flag` is what names it."""
        if column not in self.columns:
            raise DataError(
                f"{self.name} has no {flag} column {column!r}; its columns are {', '.join(self.columns)}: "
                f"name one with --{flag}"
            )

    def values(self, column: str) -> list[Any]:
        """Return a column as a list, and refuse one with a missing value."""
        values = list(self.rows[column])
        for number, value in enumerate(values, start=1):
            if value is None:
                raise DataError(f"{self.name}: row {number} has no {column}")
        return values

    def texts(self, column: str) -> list[str]:
        """Return a column of text as a list."""
        values = self.values(column)
        for number, value in enumerate(values, start=1):
            if not isinstance(value, str):
                raise DataError(f"{self.name}: row {number} holds {value!r} in {column}, which is not text")
        return values


def read_table(source: str, *, header: bool = True) -> Table:
    """Read `source` into memory; nothing is written beside the user's data.

    Args:
        source: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, a folder of .txt files, or a dataset of
            the hub as `name`, `name:split` or `name:subset:split` (the split is `train` when not given).
        header: the first line of a .csv or .tsv file names its columns; else they are named 0, 1, ...
            A .tsv file has no quotes: a quotation mark in it is part of the text.

    Raises:
        MissingPath: when there is no such file or folder.
        DataError: when it cannot be read or holds no rows.

    Example:
        >>> read_table("reviews.csv").columns  # doctest: +SKIP
        ['text', 'label']
    """
    path = Path(source).expanduser()
    reader = _reader(source, path, header)
    if reader is None:
        return _filled(Table(source, _hub(source)))
    try:
        table = reader()
    except (RankfoldError, ImportError, MemoryError):
        raise
    except Exception as error:  # each format's own library has its own exceptions
        raise DataError(f"{source} cannot be read or holds no rows: {_cause(error)}") from error
    return _filled(table)


def _reader(source: str, path: Path, header: bool) -> Callable[[], Table] | None:
    """Return what reads the local `path`, or None where the name can only be one of the hub."""
    if path.is_dir():
        return lambda: _folder(path)
    known = path.suffix.lower() in SUFFIXES
    if path.is_file() and not known:
        raise DataError(f"{path} is none of the kinds {', '.join(SUFFIXES)}")
    if not path.is_file() and (known or path.is_absolute() or source.startswith(".")):
        raise MissingPath(f"there is no data file or folder {path}")
    return (lambda: _file(path, header)) if known else None


def _folder(path: Path) -> Table:
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise DataError(f"the folder {path} holds no .txt files")
    return _documents(str(path), files)


def _documents(name: str, files: list[Path]) -> Table:
    from datasets import Dataset

    texts = [text for file in files if (text := file.read_text(encoding="utf-8")).strip()]
    return Table(name, Dataset.from_dict({"text": texts}), prose=True)


def _file(path: Path, header: bool) -> Table:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _documents(str(path), [path])
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")
    read, options = _parser(suffix, header)
    with tempfile.TemporaryDirectory(prefix="rankfold-data-") as cache, _without_progress_bars():
        return Table(str(path), read(str(path), cache_dir=cache, keep_in_memory=True, **options))


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if shown:
        datasets.enable_progress_bars()


def _parser(suffix: str, header: bool) -> tuple[Callable[..., "Dataset"], dict[str, Any]]:
    """Return what parses a kind of file, and its options: an empty field is an empty text."""
    from datasets import Dataset

    if suffix == ".parquet":
        return Dataset.from_parquet, {}
    if suffix in (".json", ".jsonl"):
        return Dataset.from_json, {}
    options: dict[str, Any] = {"keep_default_na": False} | ({} if header else {"header": None})
    return Dataset.from_csv, options | ({"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {})


SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def _hub(source: str) -> "Dataset":
    import datasets

    name, _, rest = source.partition(":")
    subset, _, split = rest.rpartition(":")
    try:
        return datasets.load_dataset(name, subset or None, split=split or "train")
    except Exception as error:  # network, authorisation, names and formats fail in many ways
        raise MissingPath(
            f"{source} is no local file or folder, nor a dataset of the hub that can be read: {_cause(error)}"
        ) from error


def _filled(table: Table) -> Table:
    if not len(table.rows):
        raise DataError(f"{table.name} is empty")
    return table


def _cause(error: BaseException) -> str:
    """Return the innermost reason in one line: libraries wrap it in general remarks."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
