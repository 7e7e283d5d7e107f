"""Every error that Rankfold raises on purpose.

Each one is a `RankfoldError` and also the built-in exception that it refines, so that code which
catches `ValueError` or `FileNotFoundError` keeps working.
"""

import difflib
from collections.abc import Iterable


class RankfoldError(Exception):
    """Base of every error that Rankfold raises on purpose; its text is one sentence for a person."""


class InvalidOption(RankfoldError, ValueError):
    """An option has a value that it cannot have."""


class InvalidRank(InvalidOption):
    """A rank is not positive, or more than the structure can hold for a weight of that shape."""


class UnknownMethod(RankfoldError, LookupError):
    """No method of that name is registered."""


class UnknownTarget(RankfoldError, ValueError):
    """A target pattern matched nothing in the model."""


class UnsupportedLayer(RankfoldError, TypeError):
    """A targeted module cannot hold an expression."""


class Incompatible(RankfoldError, ValueError):
    """The parts that were combined cannot mean anything together."""


class NotDense(RankfoldError, TypeError):
    """A change acts on activations and has no matrix of its own."""


class NotAdapted(RankfoldError, ValueError):
    """The model holds no adapter of that name."""


class FormatError(RankfoldError, ValueError):
    """A file or folder is truncated, tampered with, or of another format."""


class BaseMismatch(RankfoldError, ValueError):
    """An adapter was made for another base model."""


class OutputExists(RankfoldError, FileExistsError):
    """An output folder exists and is not empty."""


class MissingPath(RankfoldError, FileNotFoundError):
    """A file or folder does not exist."""


class MissingDependency(RankfoldError, ImportError):
    """An optional library that this call needs is not installed."""


def near_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a clause that lists the known names nearest to `name`, or an empty string.

    Example:
        >>> near_names("lroa", ["lora", "vera", "dora"])
        '; did you mean lora, vera, dora?'
    """
    near = difflib.get_close_matches(name.lower(), sorted(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""
