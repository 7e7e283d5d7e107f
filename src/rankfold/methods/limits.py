"""The limits of options, refused with a sentence that names the option and its value."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import InvalidOption


def in_range(owner: str, interval: str, /, **options: float | None) -> None:
    """Refuse an option outside an interval; None, of an option that may be left open, is within.

    Args:
        owner: whose options they are, for the sentence.
        interval: such as "[0, 1)", where a square bracket includes its end; "[1, inf)" has no upper end.
        options: by name.

    Raises:
        InvalidOption: one is not within.

    Example:
        >>> in_range("adalora", "[0, 1)", beta1=0.5, beta2=1.5)
        Traceback (most recent call last):
        ...
        rankfold.errors.InvalidOption: adalora: beta2 must be in [0, 1), not 1.5
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in options.items():
        if value is None:
            continue
        above = value >= low if interval[0] == "[" else value > low
        if not above or not (value <= high if interval[-1] == "]" else value < high):
            raise InvalidOption(f"{owner}: {name} must be {_phrase(interval)}, not {value}")


def _phrase(interval: str) -> str:
    if not interval.endswith(" inf)"):
        return f"in {interval}"
    low = interval[1:].partition(",")[0]
    return f"at least {low}" if interval[0] == "[" else "positive" if low == "0" else f"more than {low}"


def one_of(owner: str, known: Iterable[str], /, **options: str) -> None:
    """Refuse an option that is none of the words it may be.

    Raises:
        InvalidOption: one is not.

    Example:
        >>> one_of("skeleton", ("pivoted", "norms"), select="deim")
        Traceback (most recent call last):
        ...
        rankfold.errors.InvalidOption: skeleton: select must be one of pivoted, norms, not 'deim'
    """
    words = tuple(known)
    for name, value in options.items():
        if value not in words:
            raise InvalidOption(f"{owner}: {name} must be one of {', '.join(words)}, not {value!r}")


def leave_steps(owner: str, /, **shares: float) -> None:
    """Refuse shares of a training, before and after what a method does, that leave it no steps.

    Raises:
        InvalidOption: one is outside [0, 1), or all together are 1 or more.

    Example:
        >>> leave_steps("adalora", warmup=0.5, final=0.5)
        Traceback (most recent call last):
        ...
        rankfold.errors.InvalidOption: adalora: warmup and final must together be below 1, not 1
    """
    in_range(owner, "[0, 1)", **shares)
    total = sum(shares.values())
    if total >= 1:
        raise InvalidOption(f"{owner}: {' and '.join(shares)} must together be below 1, not {total:g}")
