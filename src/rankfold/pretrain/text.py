"""The text of a run: documents, and which of them are held out."""

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankfold.errors import MissingPath
from rankfold.training.data import DataError

# Folders of the standard library that hold tests or tables, not programs.
NOT_PROGRAMS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
STANDARD_LIBRARY = "Python's standard library"


@dataclass(frozen=True)
class Corpus:
    """Documents, each once and in an order that follows from what they say.

    Args:
        training: to train on.
        held_out: to measure the perplexity on.
        name: where they are from, for people.
    """

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    name: str


def read_corpus(data: Sequence[str], eval_data: Sequence[str], held_out: float) -> Corpus:
    """Read the text of a run and part it.

    Args:
        data: files, folders of .txt files and globs; none takes the standard library's sources.
        eval_data: likewise; none holds documents of `data` out.
        held_out: their share of the characters.

    Raises:
        MissingPath: when there is no such file.
        DataError: when a file is empty or not text.
    """
    documents, name = _distinct(_documents(data)), ", ".join(data) or STANDARD_LIBRARY
    if eval_data:
        return Corpus(documents, _distinct(_documents(eval_data)), name)
    training, apart = part(documents, held_out)
    return Corpus(training, apart, name)


def part(documents: Sequence[str], share: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Hold out about `share` of the characters, in whole documents; of a single document, its end.

    Documents are taken in their order while they fit in the share; where none does, the shortest is taken.

    Example:
        >>> part(["aaaa", "b", "cccccccc", "dd"], 0.35)
        (('cccccccc', 'dd'), ('aaaa', 'b'))
    """
    if len(documents) == 1:
        return _cut(documents[0], share)
    room = round(share * sum(map(len, documents)))
    taken: set[int] = set()
    for number, document in enumerate(documents):
        if len(document) <= room and len(taken) < len(documents) - 1:
            taken.add(number)
            room -= len(document)
    taken = taken or {min(range(len(documents)), key=lambda number: len(documents[number]))}
    training = tuple(document for number, document in enumerate(documents) if number not in taken)
    return training, tuple(documents[number] for number in sorted(taken))


def _cut(document: str, share: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cut one document in two, after a line where there is one near."""
    at = min(len(document) - 1, round((1 - share) * len(document)))
    line = document.rfind("\n", at // 2, at) + 1
    at = line or at
    return (document[:at],), (document[at:],)


def _distinct(documents: Iterator[str]) -> tuple[str, ...]:
    """Return documents in the order of their digests, equal ones once: the same on every machine."""
    by_digest = {hashlib.sha256(document.encode()).digest(): document for document in documents}
    return tuple(document for _, document in sorted(by_digest.items()))


def _documents(data: Sequence[str]) -> Iterator[str]:
    if not data:
        yield from standard_library()
    for source in data:
        yield from _source(source)


def _source(source: str) -> Iterator[str]:
    """Yield the documents of a file, a folder or a glob; empty files only count where they are named."""
    path = Path(source).expanduser()
    if path.is_file():
        yield _filled(path)
        return
    files = sorted(path.rglob("*.txt")) if path.is_dir() else _matches(path)
    texts = [text for file in files if file.is_file() and (text := _text(file)).strip()]
    if not texts and path.is_dir():
        raise DataError(f"the folder {source} holds no .txt files with text in them; write a glob for others")
    if not texts:
        raise (DataError if files else MissingPath)(f"there is no file with text at {source}")
    yield from texts


def _matches(path: Path) -> list[Path]:
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
    return sorted(anchor.glob(pattern))


def _filled(path: Path) -> str:
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text: byte {error.start} is not UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path} is not text: byte {content.index(0)} is zero")
    return text


def standard_library() -> Iterator[str]:
    """Yield the sources of the Python that runs, without its tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if NOT_PROGRAMS.isdisjoint(path.relative_to(root).parts):
            try:
                with tokenize.open(path) as file:  # in the encoding that it names
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # some are there to be wrong
            if text.strip():
                yield text
